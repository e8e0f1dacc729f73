package relay

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/writebuffer"
)

// TestReadDeadline: a handler ends the body of a request over HTTP/2, as of one over HTTP/1, and
// its response reaches the client.
func TestReadDeadline(t *testing.T) {
	e, _ := startEngine(t, "127.0.0.1:1")
	e.web = http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		deadlines := http.NewResponseController(w)
		if err := deadlines.SetReadDeadline(time.Now().Add(time.Hour)); !errors.Is(err, http.ErrNotSupported) {
			t.Errorf("a deadline in the future: %v", err)
		}
		front := make([]byte, len("front"))
		if _, err := io.ReadFull(r.Body, front); err != nil || string(front) != "front" {
			t.Errorf("it read %q, %v", front, err)
		}
		go func() {
			if err := deadlines.SetReadDeadline(time.Unix(1, 0)); err != nil {
				t.Error(err)
			}
		}()
		if rest, err := io.ReadAll(r.Body); err == nil || len(rest) > 0 {
			t.Errorf("then it read %q, %v", rest, err)
		}
		http.Error(w, "late", http.StatusBadRequest)
	})
	near, far := net.Pipe()
	w := writebuffer.New(far)
	go e.Serve(&listener.Conn{Conn: w, WriteBuffer: w, Identity: &listener.Identity{Upstream: new(upstream.Cluster)}, OnClose: func() {}})
	transport := &http.Transport{Protocols: new(http.Protocols), DialContext: func(context.Context, string, string) (net.Conn, error) { return near, nil }}
	transport.Protocols.SetUnencryptedHTTP2(true)
	defer transport.CloseIdleConnections()
	body, tell := io.Pipe()
	defer tell.Close()
	go func() { _, _ = io.WriteString(tell, "front") }()
	request, err := http.NewRequestWithContext(proxytest.TestContext(t), http.MethodPost, "http://x/v3/kv/put", body)
	if err != nil {
		t.Fatal(err)
	}
	response, err := transport.RoundTrip(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if text, err := io.ReadAll(response.Body); err != nil || response.StatusCode != http.StatusBadRequest || string(text) != "late\n" {
		t.Errorf("%d %q, %v", response.StatusCode, text, err)
	}
}
