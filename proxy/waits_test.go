package proxy

import (
	"runtime"
	"slices"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

func inUse() uint64 {
	runtime.GC()
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc
}

// TestWaitsLeaveNothing: a watch may last for months, and wait for the KMS each time something
// happens.
func TestWaitsLeaveNothing(t *testing.T) {
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{WatchFn: func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
		for {
			if _, err := s.Recv(); err != nil {
				return nil
			}
			if err := s.Send(&pb.WatchResponse{Events: []*mvccpb.Event{{Kv: &mvccpb.KeyValue{Key: []byte("k"), Value: proxytest.Sealed("k", "v")}}}}); err != nil {
				return err
			}
		}
	}})
	conn := startProxy(t, etcd, []etcdapi.Rule{{Prefix: "", Sealer: proxytest.Unhurried{}}}, nil).dial(t)
	s, err := pb.NewWatchClient(conn).Watch(proxytest.TestContext(t))
	if err != nil {
		t.Fatal(err)
	}
	events := func(n int) {
		for range n {
			if err := s.Send(proxytest.CreateWatch("k", "")); err != nil {
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

// TestMessageInManyFrames: each byte of a request is copied a few times, in however many frames it
// comes.
func TestMessageInManyFrames(t *testing.T) {
	c := proxytest.NewTalker(t, startProxy(t, proxytest.ServeStore(t), nil, nil).Addrs()[0].String())
	// a field that nobody knows
	msg := protowire.AppendBytes(protowire.AppendTag(nil, 15, protowire.BytesType), make([]byte, 60_000)) // less than the first window
	raw := append(rpc.Header(len(msg)), msg...)
	a := proxytest.Attempt{Fields: []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/etcdserverpb.Lease/LeaseKeepAlive"}, {Name: ":authority", Value: "x"},
		{Name: "content-type", Value: rpc.ContentType}, {Name: "te", Value: "trailers"},
	}}
	for ; len(raw) > 0; raw = raw[min(len(raw), 6):] {
		a.Frames, a.Padded = append(a.Frames, raw[:min(len(raw), 6)]), append(a.Padded, false)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if got := c.Try(t, a); !slices.Contains(got.Trailer, "grpc-status: 0") {
		t.Fatalf("%v", got)
	}
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > 100<<20 {
		t.Errorf("%d MiB were allocated", got>>20)
	}
}
