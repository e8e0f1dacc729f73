package proxy

import (
	"bytes"
	"math"
	"runtime"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
)

// cutting stores values with a byte before them, and allocates nothing.
type cutting struct{ proxytest.Reverser }

// TrySeal implements etcdapi.Sealer.
func (cutting) TrySeal(dst, _, value []byte) ([]byte, error) {
	return append(append(dst, '-'), value...), nil
}

// TryOpen implements etcdapi.Sealer.
func (cutting) TryOpen(dst, _, stored []byte) ([]byte, error) {
	return append(dst, stored[1:]...), nil
}

// relayedCalls are gets and puts of a key with a value of 300 bytes, without a rule and with one,
// and gets with deadlines.
func relayedCalls() []relayedCall {
	bytesField := func(b []byte, n protowire.Number, value []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), value)
	}
	key, value := bytesField(nil, 1, []byte("k")), bytes.Repeat([]byte("v"), 300)
	got := bytesField(nil, 2, bytesField(key[:len(key):len(key)], 5, value))
	put := bytesField(key[:len(key):len(key)], 2, value)
	rules := []etcdapi.Rule{{Sealer: cutting{}}}
	return []relayedCall{
		{"get", "/etcdserverpb.KV/Range", key, got, nil, false},
		{"get under a rule", "/etcdserverpb.KV/Range", key, got, rules, false},
		{"put", "/etcdserverpb.KV/Put", put, bytesField(nil, 1, nil), nil, false},
		{"put under a rule", "/etcdserverpb.KV/Put", put, bytesField(nil, 1, nil), rules, false},
		{"get with a deadline", "/etcdserverpb.KV/Range", key, got, nil, true},
	}
}

// TestAllocationsOfRelayedCalls: the proxy allocates nothing for a relayed call. The client and
// etcd allocate nothing, either.
func TestAllocationsOfRelayedCalls(t *testing.T) {
	if raced {
		t.Skip("the race detector allocates; make unit runs this test without it, too")
	}
	for _, call := range relayedCalls() {
		if call.timeouts {
			continue // the client allocates what differs, and so does the proxy
		}
		t.Run(call.name, func(t *testing.T) {
			r := startRelaying(t, serveFrames(t, call.response), call.rules, nil, true)
			c := newFrameClient(t, r.Addrs()[0].String(), call.path, call.request)
			c.start(t)
			const n, batch = 1000, 3
			calls := func() {
				for range n {
					c.batch(t, batch)
				}
			}
			calls() // the pools are full then
			// Timers allocate, and pools that the garbage collector empties: more on a busy
			// machine, so the least of a few runs counts.
			const most, runs = 0.02, 3
			least := math.Inf(1)
			for range runs {
				var before, after runtime.MemStats
				runtime.ReadMemStats(&before)
				calls()
				runtime.ReadMemStats(&after)
				least = min(least, float64(after.Mallocs-before.Mallocs)/(n*batch))
			}
			if t.Logf("%.3f allocations for a call", least); least > most {
				t.Errorf("%.3f allocations for a call, want 0", least)
			}
		})
	}
}
