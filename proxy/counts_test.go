package proxy

import (
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/http2/hpack"
)

// TestCallsThatEndEarlyHaveBegun: what is counted as handled was counted as started, also where a client leaves in the midst of its request.
func TestCallsThatEndEarlyHaveBegun(t *testing.T) {
	bothWays(t, func(t *testing.T, startProxy starter) {
		r := prometheus.NewRegistry()
		p := startProxy(t, serveStore(t), everything, func(c *Config) {
			c.Registerer = r
		})
		c := newTalker(t, p.Addrs()[0].String())
		a := attempt{fields: []hpack.HeaderField{
			{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/etcdserverpb.KV/Put"}, {Name: ":authority", Value: "x"},
			{Name: "content-type", Value: contentType}, {Name: "te", Value: "trailers"},
		}, frames: [][]byte{head(1)}, padded: []bool{false}, reset: true}
		for range 3 {
			c.try(t, a)
		}
		a.reset, a.frames = false, [][]byte{append(head(1), 0xff)} // is malformed
		c.try(t, a)
		a.frames = [][]byte{head(0)}
		c.try(t, a)
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
		eventually(t, "all calls that were started have ended", func() bool {
			n := count("grpc_server_handled_total")
			return n >= 2 && n == count("grpc_server_started_total")
		})
	})
}
