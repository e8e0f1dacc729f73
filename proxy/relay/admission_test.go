package relay

import (
	"context"
	"log/slog"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/metrics"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/writebuffer"
)

// TestCallsTakeTurns: while all clients have many calls in etcd, one connection sends no more than
// its share. Calls that wait are sent when others are answered, unless their clients have left.
func TestCallsTakeTurns(t *testing.T) {
	t.Parallel()
	var calls, most, all atomic.Int64
	answer := make(chan struct{})
	etcd := proxytest.ServeAll(t, func(_ any, ss grpc.ServerStream) error {
		in := new(rpc.Message)
		if err := ss.RecvMsg(in); err != nil {
			return err
		}
		in.Free()
		all.Add(1)
		if n := calls.Add(1); n > most.Load() {
			most.Store(n)
		}
		<-answer
		calls.Add(-1)
		return ss.SendMsg(&rpc.Message{Data: mem.BufferSlice{mem.SliceBuffer(nil)}})
	})
	e, conn := startEngine(t, etcd)
	kv := pb.NewKVClient(conn)
	e.calls.Store(mostCalls) // of others
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
	proxytest.Eventually(t, "a full share of calls", func() bool { return calls.Load() == clientCall })
	for range leave {
		done.Go(func() { _, _ = kv.Range(ctx, &pb.RangeRequest{Key: []byte("k")}) })
	}
	waiting := func() int {
		sum := 0
		e.mu.Lock()
		defer e.mu.Unlock()
		for s := range e.sessions {
			s.admission.mu.Lock()
			sum += int(s.admission.live.Load())
			s.admission.mu.Unlock()
		}
		return sum
	}
	proxytest.Eventually(t, "the others to wait", func() bool { return waiting() == n-clientCall+leave })
	cancel()
	proxytest.Eventually(t, "some to leave", func() bool { return waiting() == n-clientCall })
	close(answer)
	done.Wait()
	if all.Load() != n || most.Load() > clientCall {
		t.Errorf("etcd has had %d calls, %d at once", all.Load(), most.Load())
	}
	proxytest.Eventually(t, "nothing to be left", func() bool { return e.calls.Load() == mostCalls })
}

// startEngine starts an engine before the etcd at an address, without rules, and connects to it.
func startEngine(t *testing.T, etcd string) (*Engine, *grpc.ClientConn) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	m, err := metrics.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	u, err := upstream.New(upstream.Config{Endpoints: []string{"http://" + etcd}}, log, m)
	if err != nil {
		t.Fatal(err)
	}
	rules, err := etcdapi.NewRuleSet(nil)
	if err != nil {
		t.Fatal(err)
	}
	a := etcdapi.New(etcdapi.NewCore(rules, 1536<<10, log), u, m, log, listener.NewDenials(log, nil))
	e := New(a, nil, time.Second, log)
	l := proxytest.ListenLoopback(t)
	var accepting sync.WaitGroup
	accepting.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			w := writebuffer.New(conn)
			e.Serve(&listener.Conn{Conn: w, WriteBuffer: w, Plaintext: true, Identity: &listener.Identity{Upstream: u}, OnClose: func() {}})
		}
	})
	t.Cleanup(func() {
		l.Close()
		accepting.Wait()
		a.Stop()
		e.Close()
		a.Running.Wait()
		u.Close()
	})
	return e, proxytest.DialInsecure(t, l.Addr().String())
}
