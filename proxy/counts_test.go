package proxy

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// TestCallsThatEndEarlyHaveBegun: what is counted as handled was counted as started, also where a
// client leaves in the midst of its request.
func TestCallsThatEndEarlyHaveBegun(t *testing.T) {
	bothWays(t, func(t *testing.T, startProxy starter) {
		r := prometheus.NewRegistry()
		p := startProxy(t, proxytest.ServeStore(t), everything, func(c *Config) {
			c.Registerer = r
		})
		c := proxytest.NewTalker(t, p.Addrs()[0].String())
		a := proxytest.Attempt{Fields: []hpack.HeaderField{
			{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/etcdserverpb.KV/Put"}, {Name: ":authority", Value: "x"},
			{Name: "content-type", Value: rpc.ContentType}, {Name: "te", Value: "trailers"},
		}, Frames: [][]byte{rpc.Header(1)}, Padded: []bool{false}, Reset: true}
		for range 3 {
			c.Try(t, a)
		}
		a.Reset, a.Frames = false, [][]byte{append(rpc.Header(1), 0xff)} // is malformed
		c.Try(t, a)
		a.Frames = [][]byte{rpc.Header(0)}
		c.Try(t, a)
		count := func(name string) (n float64) {
			all, err := r.Gather()
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range all {
				if strings.HasSuffix(f.GetName(), name) {
					for _, m := range f.Metric {
						n += m.GetCounter().GetValue()
					}
				}
			}
			return n
		}
		// grpc-go may not begin with what is reset at once.
		proxytest.Eventually(t, "all calls that were started have ended", func() bool {
			n := count("grpc_server_handled_total")
			return n >= 2 && n == count("grpc_server_started_total")
		})
	})
}
