package alibaba

import (
	"context"
	"time"

	"github.com/aliyun/alibaba-cloud-sdk-go/sdk"
	"github.com/aliyun/alibaba-cloud-sdk-go/services/kms"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// maxCallTime bounds a call whose context has no earlier deadline.
const maxCallTime = 30 * time.Second

// call runs do with a client of its own. Every error it returns is, or wraps, a *kmsclient.Error with a safe text; one that is due to the
// context wraps the context's error too.
func (b *Backend) call(ctx context.Context, op string, do func(*kms.Client) error) error {
	ctx, cancel := context.WithTimeout(ctx, maxCallTime)
	defer cancel()
	cred, err := b.creds.get(ctx)
	if err != nil {
		return b.credentialFailure(ctx, op, err)
	}
	f := b.attempt(ctx, op, cred, do)
	if f != nil && f.stale {
		b.transport.CloseIdleConnections() // the others have been idle as long
		f = b.attempt(ctx, op, cred, do)
	}
	if f != nil && f.rejected {
		// A signature is made from two or three files, which do not change in one instant; and a token may just have run out.
		renewed, err := b.creds.renew(ctx, cred)
		if err == nil && renewed != cred {
			f = b.attempt(ctx, op, renewed, do)
		}
	}
	if f == nil {
		return nil
	}
	return f.withContext(ctx)
}

// attempt runs do once. It recovers the SDK's panics.
func (b *Backend) attempt(ctx context.Context, op string, cred credential, do func(*kms.Client) error) (f *failure) {
	t := &callTransport{ctx: ctx, base: b.transport, host: b.endpoint}
	defer func() {
		if recover() != nil { // what was thrown may quote the answer
			f = b.panicked(op, t)
		}
	}()
	config := sdk.NewConfig().WithScheme("HTTPS").WithAutoRetry(false).WithUserAgent(userAgent)
	config.Transport = t
	client, err := kms.NewClientWithOptions(b.region, config, cred.provider())
	if err != nil {
		return b.failed(op, cred, t, err)
	}
	client.Domain = b.endpoint
	client.SetReadTimeout(maxCallTime) // the context's deadline is never later
	client.SetCloseTrace(true)         // a span would be named after the URL
	// The SDK reads the proxy environment at each call and takes NO_PROXY entries for regular expressions, a bad one of which fails the
	// call. What it finds is not used: the connection pool makes up its own mind. So the SDK gets something to find.
	client.SetHttpsProxy("https://unused.invalid")
	client.SetNoProxy("unused")
	if err := do(client); err != nil {
		return b.failed(op, cred, t, err)
	}
	return nil
}

// credentialFailure is the error for a call that has no credentials to sign with.
func (b *Backend) credentialFailure(ctx context.Context, op string, err error) error {
	f := &failure{err: &kmsclient.Error{Op: op, Class: kmsclient.ClassDenied, KeyID: b.keyID, Detail: err.Error()}}
	return f.withContext(ctx)
}
