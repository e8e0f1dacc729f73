package etcdwire

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// TestFragments: every response, cut at every limit, is put together again as etcd's client does
// it, and no fragment but one of a single event reaches the limit; no two that follow each other
// would have found room in one.
func TestFragments(t *testing.T) {
	random := rand.New(rand.NewPCG(1, 2))
	for _, more := range []bool{false, true} {
		for n := range 7 {
			r := &pb.WatchResponse{Header: &pb.ResponseHeader{Revision: 7}, WatchId: 3, Fragment: more}
			for range n {
				r.Events = append(r.Events, &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte("k"), Value: bytes.Repeat([]byte("v"), random.IntN(300))}})
			}
			msg := wire(t, r)
			for limit := range len(msg) + 3 {
				all, err := Fragments(msg, limit)
				if err != nil {
					t.Fatal(err)
				}
				if all == nil {
					if len(msg) >= limit && n > 1 {
						t.Fatalf("%d events of %d bytes are not cut at %d", n, len(msg), limit)
					}
					continue
				}
				got, last := new(pb.WatchResponse), 0
				for i, f := range all {
					part := new(pb.WatchResponse)
					if err := proto.Unmarshal(f, part); err != nil {
						t.Fatal(err)
					}
					if part.Fragment != (more || i < len(all)-1) || part.WatchId != 3 || part.Header.GetRevision() != 7 || len(part.Events) == 0 {
						t.Fatalf("fragment %d of %d at %d: %v", i, len(all), limit, part)
					}
					if len(f) >= limit && len(part.Events) > 1 {
						t.Fatalf("a fragment of %d events has %d bytes, limit %d", len(part.Events), len(f), limit)
					}
					if first := proto.Size(&pb.WatchResponse{Events: part.Events[:1]}); i > 0 && last+first < limit {
						t.Fatalf("a fragment of %d bytes had room for %d more, limit %d", last, first, limit)
					}
					last = len(f)
					got.Events = append(got.Events, part.Events...)
				}
				got.Header, got.WatchId, got.Fragment = r.Header, r.WatchId, more
				if !proto.Equal(got, r) {
					t.Fatalf("put together at %d: %v, want %v", limit, got, r)
				}
			}
		}
	}
}

func TestWatchRequest(t *testing.T) {
	create := func(fragment bool) *pb.WatchRequest {
		return &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("k"), Fragment: fragment}}}
	}
	cancel := &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: 1}}}
	for _, c := range []struct {
		msg                []byte
		creates, fragments bool
	}{
		{wire(t, create(true)), true, true}, {wire(t, create(false)), true, false}, {wire(t, cancel), false, false}, {nil, false, false},
		{append(wire(t, create(true)), wire(t, cancel)...), false, false}, {append(wire(t, cancel), wire(t, create(true))...), true, true},
	} {
		if w, err := WatchRequest(c.msg, new(untouched)); err != nil || w.Creates != c.creates || w.Fragments != c.fragments {
			t.Errorf("%x: %+v, %v", c.msg, w, err)
		}
	}
	for name, err := range map[string]error{
		"request":  func() error { _, err := WatchRequest([]byte{0x0a, 0x02, 0x40}, new(untouched)); return err }(),
		"response": func() error { _, err := WatchedBy([]byte{0x10}); return err }(),
		"events":   func() error { _, err := Fragments([]byte{0x5a, 0x05}, 1); return err }(),
	} {
		if !errors.Is(err, ErrMalformed) {
			t.Errorf("a %s that is cut: %v", name, err)
		}
	}
}
