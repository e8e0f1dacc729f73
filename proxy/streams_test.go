package proxy

import (
	"context"
	"net"
	"sync/atomic"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
)

// TestManyStreams: where etcd allows two streams on a connection, ten watches of one client neither
// wait for each other nor hold up a call, and no more connections are made than that takes.
func TestManyStreams(t *testing.T) {
	l := &counting{Listener: proxytest.ListenLoopback(t)}
	s := grpc.NewServer(grpc.MaxConcurrentStreams(2))
	var active atomic.Int64
	f := &proxytest.FakeEtcd{
		RangeFn: func(context.Context, *pb.RangeRequest) (*pb.RangeResponse, error) {
			return &pb.RangeResponse{Count: 1}, nil
		},
		WatchFn: func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
			active.Add(1)
			defer active.Add(-1)
			if err := s.Send(&pb.WatchResponse{Created: true}); err != nil {
				return err
			}
			<-s.Context().Done()
			return nil
		},
	}
	pb.RegisterKVServer(s, f)
	pb.RegisterWatchServer(s, f)
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { s.Stop(); <-done })
	bothWays(t, func(t *testing.T, startProxy starter) {
		p := startProxy(t, l.Addr().String(), everything, nil)
		l.accepted.Store(0)
		useLanes(t, p, &active)
		if n := l.accepted.Load(); n > 8 { // with the relay's own
			t.Errorf("%d connections, want 8 at most", n)
		}
	})
}

// counting counts the connections that it accepts.
type counting struct {
	net.Listener
	accepted atomic.Int64
}

func (l *counting) Accept() (net.Conn, error) {
	l.accepted.Add(1)
	return l.Listener.Accept()
}

func useLanes(t *testing.T, p *running, active *atomic.Int64) {
	conn := p.dial(t)
	proxytest.Eventually(t, "etcd is connected", func() bool { return p.Ready().Checks[1].OK })
	for range 3 {
		ctx, cancel := context.WithCancel(proxytest.TestContext(t))
		for range 10 {
			w, err := pb.NewWatchClient(conn).Watch(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if r, err := w.Recv(); err != nil || !r.Created {
				t.Fatalf("%v, %v", r, err)
			}
			if _, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte("k")}); err != nil {
				t.Fatal(err)
			}
		}
		cancel()
		proxytest.Eventually(t, "every stream to end", func() bool { return active.Load() == 0 })
	}
}
