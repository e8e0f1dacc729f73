package proxy

import (
	"fmt"
	"math/rand/v2"
	"net"
	"testing"

	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// headerEtcd is an etcd that notes the header fields of the calls, and ends each call.
type headerEtcd struct {
	*proxytest.RawEtcd
	fields chan []hpack.HeaderField
}

// Headers implements http2conn.Handler.
func (e *headerEtcd) Headers(_ *http2conn.Stream, fields []hpack.HeaderField, _ bool) {
	e.fields <- fields
}

// Data implements http2conn.Handler.
func (*headerEtcd) Data(s *http2conn.Stream, _ []byte, end bool) {
	if end {
		s.Headers([]hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: rpc.ContentType}, {Name: "grpc-status", Value: "5"}}, true)
	}
}

// headerCaller is a client that waits for the end of a call.
type headerCaller struct {
	proxytest.RawEtcd
	done chan struct{}
}

// Headers implements http2conn.Handler.
func (c *headerCaller) Headers(s *http2conn.Stream, _ []hpack.HeaderField, end bool) {
	if end {
		s.Finish()
		c.done <- struct{}{}
	}
}

// TestTimeoutsReachEtcd: etcd gets the timeout of each call, and the other fields of the same call,
// although the proxy remembers header lists that differ in their timeouts only.
func TestTimeoutsReachEtcd(t *testing.T) {
	fields := make(chan []hpack.HeaderField, 1)
	address := proxytest.ServeH2(t, func(r *proxytest.RawEtcd) http2conn.Handler { return &headerEtcd{r, fields} })
	r := startRelaying(t, address, nil, nil, true)
	conn, err := net.Dial("tcp", r.Addrs()[0].String())
	if err != nil {
		t.Fatal(err)
	}
	c := &headerCaller{done: make(chan struct{}, 1)}
	c.Conn = http2conn.NewClient(conn, http2conn.Config{Handler: c, Pool: rpc.Buffers})
	served := make(chan error, 1)
	go func() { served <- c.Conn.Serve() }()
	t.Cleanup(func() {
		c.Conn.Close()
		<-served
	})
	random := rand.New(rand.NewPCG(5, 6))
	for i := range 500 {
		path := []string{"/etcdserverpb.KV/Range", "/etcdserverpb.KV/Put"}[random.IntN(2)]
		list := []hpack.HeaderField{
			{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: path},
			{Name: ":authority", Value: "etcd"}, {Name: "content-type", Value: rpc.ContentType}, {Name: "te", Value: "trailers"},
		}
		want := map[string]string{":path": path}
		// the timeouts are longer than the test, and come before or after other fields
		extra := []hpack.HeaderField{{Name: "grpc-timeout", Value: fmt.Sprintf("%dS", 1000+random.IntN(50))}, {Name: "x-user", Value: fmt.Sprint(random.IntN(12))}}
		random.Shuffle(len(extra), func(i, j int) { extra[i], extra[j] = extra[j], extra[i] })
		for _, f := range extra[:random.IntN(len(extra)+1)] {
			list = append(list, f)
			want[f.Name] = f.Value
		}
		c.Conn.Open(nil, list, false).Data(true, rpc.Header(0), nil)
		c.Conn.Flush()
		got := make(map[string]string)
		for _, f := range <-fields {
			if _, again := got[f.Name]; again {
				t.Errorf("call %d: %s is there twice", i, f.Name)
			}
			got[f.Name] = f.Value
		}
		<-c.done
		for _, name := range []string{":path", "grpc-timeout", "x-user"} {
			if got[name] != want[name] {
				t.Fatalf("call %d: %s is %q, want %q", i, name, got[name], want[name])
			}
		}
	}
}
