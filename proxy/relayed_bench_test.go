package proxy

import (
	"syscall"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
)

// cpuTime is the CPU time of the process. Unlike the time of a benchmark, it says something on a
// machine that has other work.
func cpuTime(b *testing.B) time.Duration {
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}

// BenchmarkRelayedCalls measures batches of 8 calls at the same time, in the client, the proxy and
// etcd together. The client and etcd send prepared frames.
func BenchmarkRelayedCalls(b *testing.B) {
	for _, call := range relayedCalls() {
		b.Run(call.name, func(b *testing.B) {
			r := startRelaying(b, serveFrames(b, call.response), call.rules, nil, true)
			c := newFrameClient(b, r.Addrs()[0].String(), call.path, call.request)
			if call.timeouts {
				c.setTimeouts()
			}
			c.start(b)
			const batch = 8
			c.batch(b, 1)
			b.ReportAllocs()
			before := cpuTime(b)
			for b.Loop() {
				c.batch(b, batch)
			}
			b.StopTimer()
			b.ReportMetric(float64(cpuTime(b)-before)/float64(b.N*batch), "cpu-ns/call")
		})
	}
}

// relayedCall is a call that is relayed.
type relayedCall struct {
	name, path        string
	request, response []byte
	rules             []etcdapi.Rule
	timeouts          bool // another one for each call
}
