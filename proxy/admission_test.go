package proxy

import (
	"context"
	"sync"
	"sync/atomic"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
)

// TestCallsTakeTurns: while all clients have many calls in etcd, one connection sends no more than its
// share. Calls that wait are sent when others are answered, unless their clients have left.
func TestCallsTakeTurns(t *testing.T) {
	t.Parallel()
	var calls, most, all atomic.Int64
	answer := make(chan struct{})
	etcd := serveAll(t, func(_ any, ss grpc.ServerStream) error {
		in := new(frame)
		if err := ss.RecvMsg(in); err != nil {
			return err
		}
		in.free()
		all.Add(1)
		if n := calls.Add(1); n > most.Load() {
			most.Store(n)
		}
		<-answer
		calls.Add(-1)
		return ss.SendMsg(&frame{data: mem.BufferSlice{mem.SliceBuffer(nil)}})
	})
	p := startProxy(t, etcd, scrambling(), nil)
	kv := pb.NewKVClient(p.dial(t))
	p.engine.calls.Store(mostCalls) // of others
	ctx, cancel := context.WithCancel(t.Context())
	var done sync.WaitGroup
	const n, leave = 50, 10
	for range n {
		done.Go(func() {
			if _, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte("k")}); err != nil {
				t.Error(err)
			}
		})
	}
	eventually(t, "a full share of calls", func() bool { return calls.Load() == clientCall })
	for range leave {
		done.Go(func() { _, _ = kv.Range(ctx, &pb.RangeRequest{Key: []byte("k")}) })
	}
	waiting := func() int {
		sum := 0
		p.engine.mu.Lock()
		defer p.engine.mu.Unlock()
		for s := range p.engine.sessions {
			s.admission.mu.Lock()
			sum += s.admission.live
			s.admission.mu.Unlock()
		}
		return sum
	}
	eventually(t, "the others to wait", func() bool { return waiting() == n-clientCall+leave })
	cancel()
	eventually(t, "some to leave", func() bool { return waiting() == n-clientCall })
	close(answer)
	done.Wait()
	if all.Load() != n || most.Load() > clientCall {
		t.Errorf("etcd has had %d calls, %d at once", all.Load(), most.Load())
	}
	eventually(t, "nothing to be left", func() bool { return p.engine.calls.Load() == mostCalls })
}
