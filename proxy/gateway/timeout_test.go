package gateway

import (
	"context"
	"io"
	"net"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
)

// TestSilentRequestsEnd: how long a client may take over the header of a request, and between two
// requests.
func TestSilentRequestsEnd(t *testing.T) {
	for name, tt := range map[string]struct {
		says  string
		after time.Duration
	}{
		"half a header":    {"GET /health HTTP/1.1\r\nHost", headerTimeout},
		"no other request": {"GET /nothing HTTP/1.1\r\nHost: x\r\n\r\n", idleTimeout},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				near, far := net.Pipe()
				g, err := New(&etcdapi.API{Core: etcdapi.NewCore(nil, 1536<<10, nil)})
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithCancel(t.Context())
				go g.Run(ctx, time.Second)
				defer cancel()
				go g.Serve(&listener.Conn{Conn: far, Identity: &listener.Identity{}, OnClose: func() {}})
				begun := time.Now()
				go func() { _, _ = io.WriteString(near, tt.says) }()
				_, _ = io.Copy(io.Discard, near)
				near.Close()
				if took := time.Since(begun); took != tt.after {
					t.Errorf("let go after %v, want %v", took, tt.after)
				}
			})
		})
	}
}
