package proxy

import (
	"bytes"
	"net"
	"runtime"
	"testing"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// oneKey is an etcd that responds to each Range with a key and its value.
type oneKey struct {
	*proxytest.RawEtcd
	response []byte
}

var okTrailer = []hpack.HeaderField{{Name: "grpc-status", Value: "0"}, {Name: "grpc-message", Value: ""}}

// Headers implements http2conn.Handler.
func (*oneKey) Headers(*http2conn.Stream, []hpack.HeaderField, bool) {}

// Data implements http2conn.Handler.
func (e *oneKey) Data(s *http2conn.Stream, data []byte, end bool) {
	if s.Consumed(len(data)); end {
		s.Headers(etcdHeader, false)
		s.Data(false, rpc.Header(len(e.response)), e.response)
		s.Headers(okTrailer, true)
	}
}

var etcdHeader = []hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: rpc.ContentType}}

// caller is a client that makes one call at a time.
type caller struct {
	conn *http2conn.Conn
	done chan struct{}
}

var _ http2conn.Handler = (*caller)(nil)

// Headers implements http2conn.Handler.
func (c *caller) Headers(s *http2conn.Stream, _ []hpack.HeaderField, end bool) {
	if end {
		s.Finish()
		c.done <- struct{}{}
	}
}

// Data implements http2conn.Handler.
func (*caller) Data(s *http2conn.Stream, data []byte, _ bool) { s.Consumed(len(data)) }

// Reset implements http2conn.Handler.
func (*caller) Reset(*http2conn.Stream, http2.ErrCode) {}

// Writable implements http2conn.Handler.
func (*caller) Writable(*http2conn.Stream) {}

// SettingsReceived implements http2conn.Handler.
func (*caller) SettingsReceived() {}

// GoAwayReceived implements http2conn.Handler.
func (*caller) GoAwayReceived() {}

// FlushNeeded implements http2conn.Handler.
func (c *caller) FlushNeeded() { c.conn.Flush() }

// cutting stores values with a byte before them, and allocates nothing where it reads them.
type cutting struct{ proxytest.Reverser }

// TryOpen implements etcdapi.Sealer.
func (cutting) TryOpen(dst, _, stored []byte) ([]byte, error) {
	return append(dst, stored[1:]...), nil
}

// TestAllocationsOfRelayedCalls counts what a relayed Range allocates in the client, the proxy and
// etcd together, with a value that passes and with one that is decrypted. The streams of the client
// and of etcd are two of the objects.
func TestAllocationsOfRelayedCalls(t *testing.T) {
	if raced {
		t.Skip("the race detector allocates; make unit runs this test without it, too")
	}
	// A Range of the key k, and its response with a value of 300 bytes, for which there are pooled
	// buffers.
	value := append(append([]byte{0x0a, 1, 'k'}, 0x2a, 0xac, 0x02), bytes.Repeat([]byte("v"), 300)...)
	request, response := []byte{0x0a, 1, 'k'}, append([]byte{0x12, 0xb2, 0x02}, value...)
	for name, try := range map[string]struct {
		rules []etcdapi.Rule
		most  float64
	}{
		"passing": {nil, 3.5},
		"a rule":  {[]etcdapi.Rule{{Sealer: cutting{}}}, 3.5},
	} {
		t.Run(name, func(t *testing.T) {
			address := proxytest.ServeH2(t, func(r *proxytest.RawEtcd) http2conn.Handler { return &oneKey{r, response} })
			r := startRelaying(t, address, try.rules, nil, true)
			c := &caller{done: make(chan struct{}, 1)}
			conn, err := net.Dial("tcp", r.Addrs()[0].String())
			if err != nil {
				t.Fatal(err)
			}
			c.conn = http2conn.NewClient(conn, http2conn.Config{Handler: c, Pool: rpc.Buffers})
			served := make(chan error, 1)
			go func() { served <- c.conn.Serve() }()
			header := []hpack.HeaderField{
				{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/etcdserverpb.KV/Range"},
				{Name: ":authority", Value: "etcd"}, {Name: "content-type", Value: rpc.ContentType}, {Name: "te", Value: "trailers"},
			}
			calls := func(n int) {
				for range n {
					c.conn.Open(nil, header, false).Data(true, rpc.Header(len(request)), request)
					c.conn.Flush()
					<-c.done
				}
			}
			const n = 3000
			calls(n) // the pools are full then
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			calls(n)
			runtime.ReadMemStats(&after)
			c.conn.Close()
			<-served
			got := float64(after.Mallocs-before.Mallocs) / n
			t.Logf("%.2f allocations for a call", got)
			if got > try.most {
				t.Errorf("%.2f allocations for a call, want at most %.1f", got, try.most)
			}
		})
	}
}
