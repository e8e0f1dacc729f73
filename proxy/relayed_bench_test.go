package proxy

import (
	"bytes"
	"net"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// batchCaller is a client that makes calls of a batch at the same time.
type batchCaller struct {
	caller
	open atomic.Int64
}

// Headers implements http2conn.Handler.
func (c *batchCaller) Headers(s *http2conn.Stream, _ []hpack.HeaderField, end bool) {
	if end {
		s.Finish()
		if c.open.Add(-1) == 0 {
			c.done <- struct{}{}
		}
	}
}

// cpuTime is the CPU time of the process. Unlike the time of a benchmark, it says something on a
// machine that has other work.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkRelayedCalls measures batches of 8 Range calls at the same time, in the client, the
// proxy and etcd together.
func BenchmarkRelayedCalls(b *testing.B) {
	value := append(append([]byte{0x0a, 1, 'k'}, 0x2a, 0xac, 0x02), bytes.Repeat([]byte("v"), 300)...)
	request, response := []byte{0x0a, 1, 'k'}, append([]byte{0x12, 0xb2, 0x02}, value...)
	for name, rules := range map[string][]etcdapi.Rule{"passing": nil, "a rule": {{Sealer: cutting{}}}} {
		b.Run(name, func(b *testing.B) {
			address := proxytest.ServeH2(b, func(r *proxytest.RawEtcd) http2conn.Handler { return &oneKey{r, response} })
			r := startRelaying(b, address, rules, nil, true)
			c := &batchCaller{caller: caller{done: make(chan struct{}, 1)}}
			conn, err := net.Dial("tcp", r.Addrs()[0].String())
			if err != nil {
				b.Fatal(err)
			}
			c.conn = http2conn.NewClient(conn, http2conn.Config{Handler: c, Pool: rpc.Buffers})
			served := make(chan error, 1)
			go func() { served <- c.conn.Serve() }()
			header := []hpack.HeaderField{
				{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/etcdserverpb.KV/Range"},
				{Name: ":authority", Value: "etcd"}, {Name: "content-type", Value: rpc.ContentType}, {Name: "te", Value: "trailers"},
			}
			const batch = 8
			b.ReportAllocs()
			before := cpuTime(b)
			for b.Loop() {
				c.open.Store(batch)
				for range batch {
					c.conn.Open(nil, header, false).Data(true, rpc.Header(len(request)), request)
				}
				c.conn.Flush()
				<-c.done
			}
			b.StopTimer()
			b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N*batch), "cpu-ns/call")
			c.conn.Close()
			<-served
		})
	}
}
