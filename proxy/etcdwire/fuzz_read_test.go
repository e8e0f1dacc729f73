package etcdwire

import (
	"bytes"
	"context"
	"errors"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"google.golang.org/protobuf/proto"
)

// FuzzRead holds what is only looked into against what a decoder makes of it: whatever is accepted, both understand in the same way.
func FuzzRead(f *testing.F) {
	for _, m := range []proto.Message{
		&pb.RangeRequest{Key: []byte("s/a"), SortTarget: pb.RangeRequest_VALUE, KeysOnly: true}, &pb.DeleteRangeRequest{Key: []byte("s/a"), RangeEnd: []byte("s0")},
		&v3electionpb.LeaderRequest{Name: []byte("s")}, &v3electionpb.ProclaimRequest{Leader: &v3electionpb.LeaderKey{Name: []byte("s"), Key: []byte("s/1")}},
		&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("s/"), Fragment: true}}},
		&pb.WatchResponse{WatchId: 7, Created: true, Canceled: true},
	} {
		f.Add(wire(f, m))
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		accepted := func(what string, err error, into proto.Message) bool {
			if err != nil {
				if !errors.Is(err, ErrMalformed) && !errors.Is(err, ErrByValue) && !errors.Is(err, ErrUnsupported) {
					t.Fatalf("%s: unexpected error %v", what, err)
				}
				return false
			}
			return proto.Unmarshal(msg, into) == nil
		}
		rules := brackets{"s/"}
		ranged := new(pb.RangeRequest)
		shape, err := RangeRequest(msg, rules)
		if accepted("RangeRequest", err, ranged) && (shape.KeysOnly != ranged.GetKeysOnly() ||
			ranged.GetSortTarget() == pb.RangeRequest_VALUE && rules.Overlaps(ranged.GetKey(), ranged.GetRangeEnd())) {
			t.Fatalf("RangeRequest: %+v of %v", shape, ranged)
		}
		accepted("DeleteRangeRequest", DeleteRangeRequest(msg), new(pb.DeleteRangeRequest))
		named := new(v3electionpb.LeaderRequest)
		name, err := Name(msg)
		if accepted("Name", err, named) && !bytes.Equal(name, named.GetName()) {
			t.Fatalf("Name: %q of %v", name, named)
		}
		led := new(v3electionpb.ProclaimRequest)
		key, err := LeaderKey(msg)
		if accepted("LeaderKey", err, led) && !bytes.Equal(key, led.GetLeader().GetKey()) {
			t.Fatalf("LeaderKey: %q of %v", key, led)
		}
		request := new(pb.WatchRequest)
		creates, fragments, err := WatchRequest(msg)
		if accepted("WatchRequest", err, request) && (creates != (request.GetCreateRequest() != nil) || fragments != request.GetCreateRequest().GetFragment()) {
			t.Fatalf("WatchRequest: %t, %t of %v", creates, fragments, request)
		}
		response := new(pb.WatchResponse)
		w, err := WatchedBy(msg)
		if accepted("WatchResponse", err, response) && w != (Watched{response.GetWatchId(), response.GetCreated(), response.GetCanceled()}) {
			t.Fatalf("WatchResponse: %+v of %v", w, response)
		}
		all, err := Fragments(msg, len(msg)/2)
		if accepted("Fragments", err, response) && all != nil {
			joined := new(pb.WatchResponse)
			for _, one := range all {
				part := decode(t, one, new(pb.WatchResponse))
				events := append(joined.GetEvents(), part.GetEvents()...)
				joined = part
				joined.Events = events
			}
			if !proto.Equal(joined, response) {
				t.Fatalf("Fragments: %v of %v", joined, response)
			}
		}
	})
}

// unsealing takes the brackets off where a request's rewriter puts them on.
type unsealing struct{ brackets }

func (o unsealing) Seal(ctx context.Context, key, stored []byte) ([]byte, error) {
	return o.Open(ctx, key, bytes.Clone(stored))
}

// FuzzRequestInverse seals a request and opens it again: the message must say what it said.
func FuzzRequestInverse(f *testing.F) {
	for _, m := range []string{"PutRequest", "TxnRequest"} {
		for _, sample := range samples()[m] {
			f.Add(wire(f, sample))
		}
	}
	f.Fuzz(func(t *testing.T, msg []byte) {
		for _, m := range methods {
			want := m.message()
			if m.answer || proto.Unmarshal(msg, want) != nil {
				continue
			}
			sealed, err := m.rewrite(msg, brackets{"s/"})
			if err != nil {
				continue
			}
			opened, err := m.rewrite(sealed, unsealing{brackets{"s/"}})
			if err != nil {
				t.Fatalf("%s: the inverse fails: %v", m.name, err)
			}
			if got := decode(t, opened, m.message()); !proto.Equal(got, want) {
				t.Fatalf("%s: edit and inverse differ\n got %v\nwant %v", m.name, got, want)
			}
		}
	})
}
