package alibaba

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// TestContextEndsCalls covers a KMS that is silent before, and slow within, its answer.
func TestContextEndsCalls(t *testing.T) {
	d, b, _ := newCanary(t)
	key, err := b.GenerateDataKey(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, fault := range []kmsdouble.FaultSpec{
		{Kind: kmsdouble.Hang}, {Kind: kmsdouble.Hang, Applied: true}, {Kind: kmsdouble.SlowDrip, Interval: 100 * time.Millisecond},
	} {
		d.SetFault(func(*http.Request) *kmsdouble.FaultSpec { return &fault })
		for op, call := range operations(b, key) {
			ctx, cancel := context.WithTimeout(t.Context(), 60*time.Millisecond)
			start := time.Now()
			err := call(ctx)
			cancel()
			if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 5*time.Second {
				t.Errorf("%s, %s: %v after %v", fault.Kind, op, err, time.Since(start))
			}
			if e := asError(t, err); e.Class() != kmsclient.ClassUnavailable || e.Op != op {
				t.Errorf("%s, %s: %+v", fault.Kind, op, e)
			}
			checkNoCanary(t, "error", allTexts(err))
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(20*time.Millisecond, cancel)
		if _, err := b.GenerateDataKey(ctx, ""); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", fault.Kind, err)
		}
	}
	// Another double: the one above may still be noting a request whose call has ended.
	d, b, _ = newCanary(t)
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	sent := len(d.Records())
	if _, err := b.GenerateDataKey(ended, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("ended before the call: %v", err)
	}
	if len(d.Records()) != sent {
		t.Error("a request was sent for a context that had ended")
	}
}

func TestHangReleased(t *testing.T) {
	d, b, _ := newCanary(t)
	for _, applied := range []bool{false, true} {
		release := make(chan struct{})
		d.Inject("GenerateDataKey", kmsdouble.FaultSpec{Kind: kmsdouble.Hang, Applied: applied, Release: release})
		time.AfterFunc(20*time.Millisecond, func() { close(release) })
		if _, err := b.GenerateDataKey(t.Context(), ""); err != nil {
			t.Errorf("applied=%v: %v", applied, err)
		}
	}
}

func TestSlowDripArrives(t *testing.T) {
	d, b, _ := newCanary(t)
	d.Inject("Encrypt", kmsdouble.FaultSpec{Kind: kmsdouble.SlowDrip, Interval: time.Microsecond})
	if _, err := b.Encrypt(t.Context(), "", []byte("x")); err != nil {
		t.Error(err)
	}
}

// TestStaleConnection has the double close a connection when its second request arrives, as a load
// balancer does that timed it out: one new request, with a new nonce, must do.
func TestStaleConnection(t *testing.T) {
	d, b, _ := newCanary(t)
	for op, call := range operations(b, mustDataKey(t, b)) {
		before := len(d.Records())
		d.Inject("", kmsdouble.FaultSpec{Kind: kmsdouble.Cut, Reused: true})
		if err := call(t.Context()); err != nil {
			t.Errorf("%s: %v", op, err)
		}
		if got := len(d.Records()) - before; got != 2 {
			t.Errorf("%s: %d requests, want 2", op, got)
		}
	}
	// A connection cut each time is no stale one: no further attempt.
	before := len(d.Records())
	d.SetFault(func(*http.Request) *kmsdouble.FaultSpec { return &kmsdouble.FaultSpec{Kind: kmsdouble.Cut} })
	if _, err := b.GenerateDataKey(t.Context(), ""); err == nil {
		t.Error("no error")
	}
	if got := len(d.Records()) - before; got != 2 {
		t.Errorf("%d requests, want 2", got)
	}
}

func mustDataKey(t *testing.T, b *Backend) *kmsclient.DataKey {
	t.Helper()
	key, err := b.GenerateDataKey(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// TestNoAnswerAtAll covers what goes wrong before the KMS is reached.
func TestNoAnswerAtAll(t *testing.T) {
	d, _, _ := newCanary(t)
	other := kmsdouble.New(t, kmsdouble.Config{})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := listener.Addr().String()
	_ = listener.Close()
	_, port, _ := net.SplitHostPort(d.Endpoint())
	for name, tc := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"nobody listens":      {func(c *Config) { c.Endpoint = closed }, "cannot be connected to"},
		"name not resolved":   {func(c *Config) { c.Endpoint = "kms.invalid" }, ""},
		"unknown authority":   {func(c *Config) { c.CAFile = other.CAFile() }, "unknown authority (see caFile)"},
		"system roots only":   {func(c *Config) { c.CAFile = "" }, "unknown authority (see caFile)"},
		"certificate's names": {func(c *Config) { c.Endpoint = "127.0.0.2:" + port }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBackend(t, d, func(c *Config) {
				t.Setenv("ALIBABA_CLOUD_SECURITY_TOKEN", canaryToken)
				c.Credentials.Type = STS
				tc.change(c)
			})
			_, err := b.Encrypt(t.Context(), "", []byte(canaryPlaintext))
			e := asError(t, err)
			if e.Class() != kmsclient.ClassUnavailable || !strings.Contains(e.Detail, tc.want) || e.HTTPStatus != 0 {
				t.Errorf("%+v", e)
			}
			checkNoCanary(t, "error", allTexts(err))
		})
	}
}

// TestPlainHTTPServer checks that a server without TLS gets no request.
func TestPlainHTTPServer(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan []byte, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			close(got)
			return
		}
		_ = conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		text, _ := io.ReadAll(conn)
		_ = conn.Close()
		got <- text
	}()
	d := kmsdouble.New(t, kmsdouble.Config{})
	b := newBackend(t, d, func(c *Config) { c.Endpoint = listener.Addr().String() })
	_, err = b.Encrypt(t.Context(), "", []byte(canaryPlaintext))
	if e := asError(t, err); e.Class() != kmsclient.ClassUnavailable {
		t.Errorf("%+v", e)
	}
	_ = listener.Close()
	if text := <-got; bytes.Contains(text, []byte("POST")) || bytes.Contains(text, []byte("Action")) {
		t.Errorf("a plaintext request was sent: %q", text)
	}
}

// TestBrokenProxyEnvironment has a NO_PROXY that the SDK could not use.
func TestBrokenProxyEnvironment(t *testing.T) {
	t.Setenv("NO_PROXY", "[::1,127.0.0.1,(")
	_, b := newPair(t)
	if _, err := b.GenerateDataKey(t.Context(), ""); err != nil {
		t.Error(err)
	}
}

// TestOtherHostsAreRefused checks the transport's own guard.
func TestOtherHostsAreRefused(t *testing.T) {
	for _, address := range []string{"http://kms.example.com/", "https://sts.example.com/", "https://kms.example.com:444/"} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, address, strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		tr := &callTransport{ctx: t.Context(), base: http.DefaultTransport, host: "kms.example.com"}
		if resp, err := tr.RoundTrip(req); !errors.Is(err, errForeign) {
			if err == nil {
				_ = resp.Body.Close()
			}
			t.Errorf("%s: %v", address, err)
		}
	}
}

// TestConcurrentUse is for the race detector: the SDK's clients race as soon as two goroutines
// share one.
func TestConcurrentUse(t *testing.T) {
	d, b, _ := newCanary(t)
	key := mustDataKey(t, b)
	d.SetFault(func(r *http.Request) *kmsdouble.FaultSpec {
		if strings.Contains(r.URL.RawQuery, "Nonce=0") { // one in sixteen
			return &kmsdouble.FaultSpec{Kind: kmsdouble.ServerError}
		}
		return nil
	})
	var wg sync.WaitGroup
	for range 24 {
		wg.Go(func() {
			for range 5 {
				for op, call := range operations(b, key) {
					var e *kmsclient.Error
					if err := call(t.Context()); err != nil && (!errors.As(err, &e) || e.HTTPStatus != 503) {
						t.Errorf("%s: %v", op, err)
					}
				}
			}
		})
	}
	wg.Wait()
}
