package proxy

import (
	"context"
	"runtime"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
)

// unhurried opens and seals nothing in haste, and everything for who waits.
type unhurried struct{}

func (unhurried) Seal(ctx context.Context, key, value []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return reverser{}.Seal(ctx, key, value)
}

func (unhurried) Open(ctx context.Context, key, stored []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	return reverser{}.Open(ctx, key, stored)
}

func inUse() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestWaitsLeaveNothing: a watch may last for months, and wait for the KMS each time something happens.
func TestWaitsLeaveNothing(t *testing.T) {
	etcd := serveFake(t, &fakeEtcd{watchFn: func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
		for {
			if _, err := s.Recv(); err != nil {
				return nil
			}
			if err := s.Send(&pb.WatchResponse{Events: []*mvccpb.Event{{Kv: &mvccpb.KeyValue{Key: []byte("k"), Value: sealed("k", "v")}}}}); err != nil {
				return err
			}
		}
	}})
	conn := startProxy(t, etcd, []Rule{{Prefix: "", Sealer: unhurried{}}}, nil).dial(t)
	s, err := pb.NewWatchClient(conn).Watch(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	events := func(n int) {
		for range n {
			if err := s.Send(createWatch("k", "")); err != nil {
				t.Fatal(err)
			}
			if r, err := s.Recv(); err != nil || string(r.Events[0].Kv.Value) != "v" {
				t.Fatalf("%v, %v", r, err)
			}
		}
	}
	events(500)
	before := inUse()
	const n = 5000
	events(n)
	if after := inUse(); after > before+n*100 {
		t.Errorf("after %d waits, %d bytes are held for each", n, (after-before)/n)
	}
}
