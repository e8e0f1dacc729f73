package alibaba

import (
	"context"
	"errors"
	"time"

	"github.com/aliyun/alibaba-cloud-sdk-go/sdk"
	"github.com/aliyun/alibaba-cloud-sdk-go/services/kms"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// maxCallTime bounds a call whose context has no earlier deadline.
const maxCallTime = 30 * time.Second

// remote is an endpoint that speaks the vendor's RPC protocol: the KMS, or the service that gives
// its credentials (STS).
type remote struct {
	name     string // "the KMS" or "STS", for texts
	caField  string // the field that names its CA, for texts
	region   string
	endpoint string   // host or host:port
	keyID    string   // that errors are about: as configured; "" for STS
	hidden   []string // what no error may quote
	pool     *pool
}

// call runs do with a client of its own, and returns its response. Every error it returns is, or
// wraps, a *kmsclient.Error with a safe text; one that is due to the context wraps the context's
// error too.
func call[R any](ctx context.Context, b *Backend, op string, do func(*kms.Client) (R, error)) (response R, err error) {
	ctx, cancel := context.WithTimeout(ctx, maxCallTime)
	defer cancel()
	cred, err := b.creds.get(ctx)
	if err != nil {
		return response, b.credentialFailure(ctx, op, err)
	}
	f := b.callSigned(ctx, op, b.creds, cred, func(c *kms.Client) (err error) {
		response, err = do(c)
		return err
	})
	if f != nil {
		return response, f.withContext(ctx)
	}
	return response, nil
}

// callSigned runs do with cred, and once more if source has other credentials when these are
// rejected: a signature is made from two or three files, which do not change in one instant, and a
// token may just have run out.
func (r *remote) callSigned(ctx context.Context, op string, source credentialSource, cred credential, do func(*kms.Client) error) *failure {
	f := r.request(ctx, op, cred, do)
	if f == nil || !f.rejected {
		return f
	}
	renewed, err := source.renew(ctx, cred)
	if err != nil || renewed == cred {
		return f
	}
	return r.request(ctx, op, renewed, do)
}

// request runs do once, and once more if it met a connection that was dead.
func (r *remote) request(ctx context.Context, op string, cred credential, do func(*kms.Client) error) *failure {
	return r.retryStale(ctx, op, cred, func(t *callTransport) error { return r.withClient(cred, t, do) })
}

// retryStale runs do with a transport, and once more if it met a connection that was dead.
func (r *remote) retryStale(ctx context.Context, op string, cred credential, do func(*callTransport) error) *failure {
	f := r.attempt(ctx, op, cred, do)
	if f != nil && f.stale {
		r.pool.CloseIdleConnections() // the others have been idle as long
		f = r.attempt(ctx, op, cred, do)
	}
	return f
}

// attempt runs do once. It recovers the SDK's panics.
func (r *remote) attempt(ctx context.Context, op string, cred credential, do func(*callTransport) error) (f *failure) {
	t := &callTransport{ctx: ctx, base: r.pool, host: r.endpoint}
	defer func() {
		if recover() != nil { // what was thrown may quote the answer
			f = r.panicked(op, t)
		}
	}()
	if err := do(t); err != nil {
		return r.failed(op, cred, t, err)
	}
	return nil
}

// withClient runs do with a new client, which signs with cred. A kms.Client signs for every
// product; it only adds the KMS' operations.
func (r *remote) withClient(cred credential, t *callTransport, do func(*kms.Client) error) error {
	config := sdk.NewConfig().WithScheme("HTTPS").WithAutoRetry(false).WithUserAgent(userAgent)
	config.Transport = t
	client, err := kms.NewClientWithOptions(r.region, config, provider{cred})
	if err != nil {
		return err
	}
	client.Domain = r.endpoint
	client.SetReadTimeout(maxCallTime) // the context's deadline is never later
	client.SetCloseTrace(true)         // a span would be named after the URL
	// The SDK reads the proxy environment at each call and takes NO_PROXY entries for regular
	// expressions, a bad one of which fails the call. What it finds is not used: the connection
	// pool makes up its own mind. So the SDK gets something to find.
	client.SetHttpsProxy("https://unused.invalid")
	client.SetNoProxy("unused")
	return do(client)
}

// credentialFailure is the error for a call that has no credentials to sign with: that of the
// service that should have given them, or of the context that ended while it was waited for.
func (b *Backend) credentialFailure(ctx context.Context, op string, err error) error {
	e := &kmsclient.Error{Reason: kmsclient.Unreachable}
	if known, ok := errors.AsType[*kmsclient.Error](err); ok {
		copied := *known // others get the same one
		e = &copied
		e.Detail = "no credentials: " + known.Detail
	}
	e.Op, e.KeyID = op, b.keyID
	return (&failure{err: e, noCredentials: true}).withContext(ctx)
}
