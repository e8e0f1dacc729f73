package proxy

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// webTLS is a proxy over TLS, with what a client needs for it.
type webTLS struct {
	*running
	base  string
	roots *x509.CertPool
}

func newWebTLS(t *testing.T, etcd *proxytest.FakeEtcd) *webTLS {
	t.Helper()
	own := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "%s %s", r.Method, r.URL.Path) }))
	t.Cleanup(own.Close)
	ca := proxytest.NewAuthority(t, "ca")
	cert, key, _ := ca.Issue("server", "server")
	w := &webTLS{roots: x509.NewCertPool()}
	w.roots.AddCert(ca.Cert)
	w.running = startProxy(t, proxytest.ServeFake(t, etcd), []etcdapi.Rule{{Prefix: "k", Sealer: proxytest.Reverser{}}}, func(c *Config) {
		c.Listeners[0].TLS = &listener.TLS{CertFile: cert, KeyFile: key}
		c.Upstream.HTTPEndpoints = []string{own.URL}
	})
	w.base = "https://" + w.Addrs()[0].String()
	return w
}

// Client speaks HTTP/2 alone.
func (w *webTLS) Client(t *testing.T) *http.Client {
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: w.roots}, Protocols: new(http.Protocols)}
	transport.Protocols.SetHTTP2(true)
	t.Cleanup(transport.CloseIdleConnections)
	return &http.Client{Transport: transport}
}

func (w *webTLS) do(t *testing.T, client *http.Client, method, path string, body io.Reader) (*http.Response, error) {
	t.Helper()
	r, err := http.NewRequestWithContext(proxytest.TestContext(t), method, w.base+path, body)
	if err != nil {
		t.Fatal(err)
	}
	return client.Do(r)
}

// TestWebOverHTTP2: over TLS, HTTP/2 carries HTTP as well as gRPC, both at once on one connection.
func TestWebOverHTTP2(t *testing.T) {
	w := newWebTLS(t, watchingEtcd(nil))
	client := w.Client(t)
	for _, try := range []struct {
		Method, path, body string
		status             int
		want               string
	}{
		{"GET", "/health", "", 200, "GET /health"}, {"HEAD", "/version", "", 200, ""}, {"POST", "/metrics", "x", 200, "POST /metrics"}, {"OPTIONS", "/v3/kv/range", "", 200, ""},
		{"POST", "/v3/kv/range", rangeOfK, 200, `"dg=="`}, {"POST", "/v3beta/kv/range", rangeOfK, 200, `"dg=="`}, {"GET", "/v3/kv/range", "", 501, "Method Not Allowed"}, {"GET", "/nothing", "", 404, "not found"},
		{"POST", "/v3/kv/range", strings.Repeat(" ", 6<<20), 400, "too large"},
	} {
		answer, err := w.do(t, client, try.Method, try.path, strings.NewReader(try.body))
		if err != nil {
			t.Errorf("%s %s: %v", try.Method, try.path, err)
			continue
		}
		body, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		if err != nil || answer.ProtoMajor != 2 || answer.StatusCode != try.status || !strings.Contains(string(body), try.want) {
			t.Errorf("%s %s: HTTP/%d %d %q, %v", try.Method, try.path, answer.ProtoMajor, answer.StatusCode, body, err)
		}
	}
	said, tell := io.Pipe()
	go func() { _, _ = io.WriteString(tell, watchK) }() // there is no response before
	answer, err := w.do(t, client, "POST", "/v3/watch", said)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	lines := bufio.NewReader(answer.Body)
	for i := range 3 {
		if i > 0 {
			if _, err := io.WriteString(tell, watchK); err != nil {
				t.Fatal(err)
			}
		}
		if line, err := lines.ReadString('\n'); err != nil || !strings.Contains(line, `"dg=="`) {
			t.Errorf("a watch: %q, %v", line, err)
		}
	}
	tell.Close()
	if rest, err := io.ReadAll(lines); err != nil || len(bytes.TrimSpace(rest)) > 0 {
		t.Errorf("at the end: %q, %v", rest, err)
	}
}

// TestWebStreamsEnd: a client that leaves ends what it has requested, and so does the proxy.
func TestWebStreamsEnd(t *testing.T) {
	arrived, gone := make(chan struct{}, 1), make(chan struct{}, 1)
	etcd := proxytest.EchoEtcd()
	etcd.RangeFn = func(ctx context.Context, _ *pb.RangeRequest) (*pb.RangeResponse, error) {
		arrived <- struct{}{}
		<-ctx.Done()
		gone <- struct{}{}
		return nil, ctx.Err()
	}
	w := newWebTLS(t, etcd)
	client := w.Client(t)
	ctx, cancel := context.WithCancel(proxytest.TestContext(t))
	failed := make(chan error, 1)
	go func() {
		r, err := http.NewRequestWithContext(ctx, "POST", w.base+"/v3/kv/range", strings.NewReader(rangeOfK))
		if err == nil {
			_, err = client.Do(r) //nolint:bodyclose // there is none
		}
		failed <- err
	}()
	proxytest.Wait(t, arrived, "the request")
	cancel()
	proxytest.Wait(t, gone, "its end")
	if err := proxytest.Wait(t, failed, "the client's end"); err == nil {
		t.Error("it was answered")
	}
	begun := time.Now()
	if err := w.stop(); err != nil || time.Since(begun) > DefaultDrainTimeout/2 {
		t.Errorf("the end: %v after %v", err, time.Since(begun))
	}
}

// TestALPN: what a client offers decides what it speaks, as with etcd: a client that offers HTTP/2
// gets it, and may send gRPC.
func TestALPN(t *testing.T) {
	w := newWebTLS(t, proxytest.EchoEtcd())
	address := w.Addrs()[0].String()
	for _, try := range []struct {
		offers []string
		want   string
	}{
		{[]string{"h2"}, "h2"}, {[]string{"h2", "http/1.1"}, "h2"}, {[]string{"http/1.1", "h2"}, "h2"}, {[]string{"http/1.1"}, "http/1.1"}, {nil, ""},
	} {
		conn, err := tls.Dial("tcp", address, &tls.Config{RootCAs: w.roots, NextProtos: try.offers})
		if err != nil {
			t.Fatal(err)
		}
		if got := conn.ConnectionState().NegotiatedProtocol; got != try.want {
			t.Errorf("%q: %q", try.offers, got)
		}
		conn.Close()
		client := proxytest.Dial(t, address, grpc.WithTransportCredentials(credentials.NewTLS(&tls.Config{RootCAs: w.roots, NextProtos: try.offers})))
		if value, err := proxytest.Get(t, client); err != nil || value != "v" {
			t.Errorf("gRPC, %q: %q, %v", try.offers, value, err)
		}
	}
}

// TestWebWithoutTLS: without TLS, HTTP/2 is gRPC's alone, as at etcd.
func TestWebWithoutTLS(t *testing.T) {
	address := webBase(t, nil)
	transport := &http.Transport{Protocols: new(http.Protocols)}
	transport.Protocols.SetUnencryptedHTTP2(true)
	defer transport.CloseIdleConnections()
	answer, err := (&http.Client{Transport: transport}).Get("http://" + address + "/health")
	if err != nil {
		t.Fatal(err)
	}
	answer.Body.Close()
	if answer.StatusCode != http.StatusUnsupportedMediaType || answer.Header.Get("Content-Type") != rpc.ContentType {
		t.Errorf("%d %v", answer.StatusCode, answer.Header)
	}
	if _, err := proxytest.Get(t, proxytest.DialInsecure(t, address)); status.Code(err) != codes.OK {
		t.Error(err)
	}
}

// TestLateBody: a request that is refused before its body has arrived is not reset in the midst of
// it.
func TestLateBody(t *testing.T) {
	w := newWebTLS(t, proxytest.EchoEtcd())
	conn, err := tls.Dial("tcp", w.Addrs()[0].String(), &tls.Config{RootCAs: w.roots, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if err := conn.SetDeadline(time.Now().Add(proxytest.Patience)); err != nil {
		t.Fatal(err)
	}
	var out, block bytes.Buffer
	out.WriteString(http2.ClientPreface)
	framer := http2.NewFramer(&out, conn)
	_ = framer.WriteSettings() // a bytes.Buffer takes everything
	enc := hpack.NewEncoder(&block)
	flush := func() {
		if _, err := out.WriteTo(conn); err != nil {
			t.Fatal(err)
		}
	}
	for id := uint32(1); id < 40; id += 2 {
		block.Reset()
		for _, f := range [][2]string{{":method", "POST"}, {":path", "/nothing"}, {":scheme", "https"}, {":authority", "localhost"}} {
			_ = enc.WriteField(hpack.HeaderField{Name: f[0], Value: f[1]})
		}
		_ = framer.WriteHeaders(http2.HeadersFrameParam{StreamID: id, BlockFragment: block.Bytes(), EndHeaders: true})
		flush()
		time.Sleep(5 * time.Millisecond) // the response would be there now
		_ = framer.WriteData(id, true, []byte("late"))
		flush()
	}
	for ended := 0; ended < 20; {
		f, err := framer.ReadFrame()
		if err != nil {
			t.Fatal(err)
		}
		if f.Header().Type == http2.FrameRSTStream {
			t.Errorf("%v", f)
			ended++
		} else if f.Header().Type == http2.FrameData && f.Header().Flags.Has(http2.FlagDataEndStream) {
			ended++
		}
	}
}
