package proxy

import (
	"context"
	"runtime"
	"slices"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/encoding/protowire"
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

func (unhurried) TrySeal(_, _ []byte) ([]byte, error) { return nil, ErrWouldBlock }
func (unhurried) TryOpen(_, _ []byte) ([]byte, error) { return nil, ErrWouldBlock }
func (unhurried) Ready([]byte) bool                   { return false }

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

// TestFramesForWhoWaits: what comes for a direction that waits is held as bytes, and not frame by frame: a client may send empty ones without end.
func TestFramesForWhoWaits(t *testing.T) {
	st := new(fstream)
	st.inward.parked = true
	for _, data := range []string{"", "a", "", "", "b", ""} {
		st.in([]byte(data), false)
	}
	st.in(nil, true)
	if b := st.inward.backlog; len(b) != 1 || string(b[0].data) != "ab" || !b[0].end {
		t.Errorf("%d pieces: %v", len(b), b)
	}
}

// TestMessageInManyFrames: each byte of a request is copied a few times, in however many frames it comes.
func TestMessageInManyFrames(t *testing.T) {
	c := newTalker(t, startProxy(t, serveStore(t), nil, nil).Addrs()[0].String())
	msg := protowire.AppendBytes(protowire.AppendTag(nil, 15, protowire.BytesType), make([]byte, 200_000)) // a field that nobody knows
	raw := append(head(len(msg)), msg...)
	a := attempt{fields: []hpack.HeaderField{
		{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "http"}, {Name: ":path", Value: "/etcdserverpb.Lease/LeaseKeepAlive"}, {Name: ":authority", Value: "x"},
		{Name: "content-type", Value: contentType}, {Name: "te", Value: "trailers"},
	}}
	for ; len(raw) > 0; raw = raw[min(len(raw), 20):] {
		a.frames, a.padded = append(a.frames, raw[:min(len(raw), 20)]), append(a.padded, false)
	}
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	if got := c.try(t, a); !slices.Contains(got.Trailer, "grpc-status: 0") {
		t.Fatalf("%v", got)
	}
	runtime.ReadMemStats(&after)
	if got := after.TotalAlloc - before.TotalAlloc; got > 100<<20 {
		t.Errorf("%d MiB were allocated", got>>20)
	}
}
