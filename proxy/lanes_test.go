package proxy

import (
	"context"
	"math"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
)

func TestStreamLimit(t *testing.T) {
	for name, tt := range map[string]struct {
		said  string
		limit uint32
		done  bool
	}{
		"nothing":             {"", 0, false},
		"half a head":         {"\x00\x00\x06\x04", 0, false},
		"half a setting":      {"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00", 0, false},
		"none":                {"\x00\x00\x00\x04\x00\x00\x00\x00\x00", math.MaxUint32, true},
		"another":             {"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x04\x00\x00\x00\x07", math.MaxUint32, true},
		"the one":             {"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x07", 7, true},
		"the last one counts": {"\x00\x00\x12\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x07\x00\x04\x00\x00\x00\x01\x00\x03\x00\x00\x01\x00", 256, true},
		"and what follows":    {"\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x07\x00\x00\x06\x04", 7, true},
		"a cut setting":       {"\x00\x00\x05\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00", math.MaxUint32, true},
		"an acknowledgement":  {"\x00\x00\x06\x04\x01\x00\x00\x00\x00\x00\x03\x00\x00\x00\x07", math.MaxUint32, true},
		"another frame":       {"\x00\x00\x06\x06\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x07", math.MaxUint32, true},
		"a frame of 16 MiB":   {"\xff\xff\xff\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x07", math.MaxUint32, true},
		"HTTP/1":              {"HTTP/1.1 400 Bad Request\r\n\r\n", math.MaxUint32, true},
	} {
		if limit, done := streamLimit([]byte(tt.said)); limit != tt.limit || done != tt.done {
			t.Errorf("%s: %d, %t", name, limit, done)
		}
	}
}

// TestLanes: where etcd allows two streams on a connection, ten watches of one client neither wait for each other nor hold up a call, and no more connections are made
// than that takes.
func TestLanes(t *testing.T) {
	l := listenLoopback(t)
	s := grpc.NewServer(grpc.MaxConcurrentStreams(2))
	f := &fakeEtcd{
		rangeFn: func(context.Context, *pb.RangeRequest) (*pb.RangeResponse, error) {
			return &pb.RangeResponse{Count: 1}, nil
		},
		watchFn: func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
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
		useLanes(t, p)
		if n := len(p.upstream.lanes.more); n > 5 {
			t.Errorf("%d lanes beside the first, want 5 at most", n)
		}
	})
}

func useLanes(t *testing.T, p *running) {
	conn := p.dial(t)
	eventually(t, "etcd is connected", func() bool { return p.upstream.up.Load() })
	for range 3 {
		ctx, cancel := context.WithCancel(testContext(t))
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
		eventually(t, "every lane is given back", func() bool {
			p.upstream.lanes.mu.Lock()
			defer p.upstream.lanes.mu.Unlock()
			calls := p.upstream.first.calls.Load()
			for _, l := range p.upstream.lanes.more {
				calls += l.calls.Load()
			}
			return calls == 0
		})
	}
}
