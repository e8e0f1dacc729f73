package alibaba

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptrace"
	"sync"
	"sync/atomic"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/filewatch"
)

// maxResponse limits the bytes of a response's body; real ones have a few KiB.
const maxResponse = 1 << 20

var (
	errRedirect = errors.New("the endpoint answered with a redirect")
	errTooLarge = errors.New("the answer is larger than 1 MiB")
	errForeign  = errors.New("the request is not for the configured endpoint over HTTPS")
)

// pool is the connections that the calls of a backend share. When the file of CAs changes, further
// calls have connections that are verified by the new ones. It is safe for concurrent use.
type pool struct {
	files *filewatch.Files[*http.Transport]
}

var _ http.RoundTripper = (*pool)(nil)

// newPool makes the pool of an endpoint whose certificate is verified by the CAs of a file, or by
// the system's if caFile is empty.
func newPool(caFile string, logger *slog.Logger) (*pool, error) {
	var last *http.Transport
	files := filewatch.Config{Paths: []string{caFile}, What: "the CA " + caFile, Logger: logger}
	live, err := filewatch.New(files, func(data filewatch.Contents) (*http.Transport, error) {
		var roots *x509.CertPool
		if caFile != "" {
			roots = x509.NewCertPool()
			if !roots.AppendCertsFromPEM(data[caFile]) {
				return nil, fmt.Errorf("caFile %s holds no PEM certificate", caFile)
			}
			if err := filewatch.CompletePEM(caFile, data[caFile]); err != nil {
				return nil, fmt.Errorf("caFile: %w", err)
			}
		}
		if last != nil {
			last.CloseIdleConnections()
		}
		last = newTransport(roots)
		return last, nil
	})
	if err != nil {
		return nil, fmt.Errorf("read caFile: %w", err)
	}
	return &pool{files: live}, nil
}

// transport is that of the CAs of the moment.
func (p *pool) transport() *http.Transport { return p.files.Get() }

// problem checks the file of CAs, and returns why it is not in use.
func (p *pool) problem() error {
	p.files.Get()
	return p.files.Problem() //nolint:wrapcheck // it names the file
}

// RoundTrip implements [http.RoundTripper].
func (p *pool) RoundTrip(req *http.Request) (*http.Response, error) {
	return p.transport().RoundTrip(req) //nolint:wrapcheck // as the transport says it
}

// CloseIdleConnections closes what no call is using.
func (p *pool) CloseIdleConnections() { p.transport().CloseIdleConnections() }

// newTransport makes connections that are verified by roots, or by the system's CAs. They are
// HTTP/1.1, as the SDK's own are.
func newTransport(roots *x509.CertPool) *http.Transport {
	return &http.Transport{
		Proxy:               http.ProxyFromEnvironment,
		DialContext:         (&net.Dialer{Timeout: 5 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSClientConfig:     &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: roots},
		TLSHandshakeTimeout: 5 * time.Second,
		MaxIdleConnsPerHost: 16,
		// below what load balancers allow, so that few connections are found stale
		IdleConnTimeout:        30 * time.Second,
		MaxResponseHeaderBytes: 64 << 10,
		DisableCompression:     true, // a small compressed answer could be a large one
	}
}

// callTransport carries one call of the SDK over the shared pool, and remembers what an error needs
// to be understood. The SDK reconfigures an *http.Transport at each call; any other RoundTripper,
// such as this one, it leaves alone.
type callTransport struct {
	ctx  context.Context // the caller's
	base http.RoundTripper
	host string

	status    atomic.Int64 // the answer's HTTP status, 0 without an answer
	reused    atomic.Bool  // the connection had served before
	firstByte atomic.Bool  // the answer had begun
}

// RoundTrip implements [http.RoundTripper].
func (t *callTransport) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" || req.URL.Host != t.host {
		if req.Body != nil { // which a RoundTripper closes in any case
			_ = req.Body.Close()
		}
		return nil, errForeign
	}
	ctx, release := joinContexts(t.ctx, req.Context())
	ctx = httptrace.WithClientTrace(ctx, &httptrace.ClientTrace{
		GotConn:              func(i httptrace.GotConnInfo) { t.reused.Store(i.Reused) },
		GotFirstResponseByte: func() { t.firstByte.Store(true) },
	})
	resp, err := t.base.RoundTrip(req.WithContext(ctx))
	if err != nil {
		release()
		return nil, err
	}
	t.status.Store(int64(resp.StatusCode))
	resp.Body = &limitedBody{ReadCloser: http.MaxBytesReader(nil, resp.Body, maxResponse), release: release}
	if resp.StatusCode >= 300 && resp.StatusCode < 400 {
		// Followed, it would repeat the URL, with its token, to whom the answer names.
		_ = resp.Body.Close()
		return nil, errRedirect
	}
	return resp, nil
}

// stale reports whether a failed call met a connection that the other side had closed while it was
// idle: then the KMS never saw the request, or at most once, and a new request with a new nonce is
// safe.
func (t *callTransport) stale() bool {
	return t.reused.Load() && !t.firstByte.Load() && t.ctx.Err() == nil
}

// joinContexts returns a context with the values of a that ends with either of them. release frees
// it, more than once if need be.
func joinContexts(a, b context.Context) (ctx context.Context, release func()) {
	ctx, cancel := context.WithCancelCause(a)
	stop := context.AfterFunc(b, func() { cancel(context.Cause(b)) })
	return ctx, func() {
		stop()
		cancel(context.Canceled)
	}
}

// limitedBody is a response's body with a limit. It releases the request's context when it is
// closed.
type limitedBody struct {
	io.ReadCloser // of [http.MaxBytesReader]
	release       func()
	once          sync.Once
}

func (b *limitedBody) Read(p []byte) (int, error) {
	n, err := b.ReadCloser.Read(p)
	if isA[*http.MaxBytesError](err) {
		err = errTooLarge
	}
	return n, err
}

func (b *limitedBody) Close() error {
	err := b.ReadCloser.Close()
	b.once.Do(b.release)
	return err
}
