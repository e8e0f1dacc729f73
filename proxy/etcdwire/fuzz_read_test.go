package etcdwire

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"google.golang.org/protobuf/proto"
)

// FuzzRead holds what is only inspected against what a decoder makes of it: whatever is accepted,
// both understand in the same way.
func FuzzRead(f *testing.F) {
	for _, m := range []proto.Message{
		&pb.RangeRequest{Key: []byte("s/a"), SortTarget: pb.RangeRequest_VALUE, KeysOnly: true}, &pb.DeleteRangeRequest{Key: []byte("s/a"), RangeEnd: []byte("s0")},
		&v3electionpb.LeaderRequest{Name: []byte("s")}, &v3electionpb.ProclaimRequest{Leader: &v3electionpb.LeaderKey{Name: []byte("s"), Key: []byte("s/1")}},
		&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte("s/"), Fragment: true}}},
		&pb.PutRequest{Key: []byte("s/a"), Value: []byte("v")}, &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE},
		&pb.TxnRequest{Success: []*pb.RequestOp{put("s/a", "v"), nested(&pb.TxnRequest{Failure: []*pb.RequestOp{rng(&pb.RangeRequest{Key: []byte("s")})}})}},
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
		shape, touches, err := RangeRequest(msg, rules)
		if accepted("RangeRequest", err, ranged) && (shape.KeysOnly != ranged.GetKeysOnly() ||
			touches != rules.Overlaps(ranged.GetKey(), ranged.GetRangeEnd()) || ranged.GetSortTarget() == pb.RangeRequest_VALUE && touches) {
			t.Fatalf("RangeRequest: %+v of %v", shape, ranged)
		}
		deleted := new(pb.DeleteRangeRequest)
		from, to, err := DeleteRangeRequest(msg)
		if accepted("DeleteRangeRequest", err, deleted) && (!bytes.Equal(from, deleted.GetKey()) || !bytes.Equal(to, deleted.GetRangeEnd())) {
			t.Fatalf("DeleteRangeRequest: %q, %q of %v", from, to, deleted)
		}
		putting := new(pb.PutRequest)
		written, err := PutKey(msg)
		if accepted("PutKey", err, putting) && !bytes.Equal(written, putting.GetKey()) {
			t.Fatalf("PutKey: %q of %v", written, putting)
		}
		alarm := new(pb.AlarmRequest)
		action, err := AlarmAction(msg)
		if accepted("AlarmAction", err, alarm) && action != int32(alarm.GetAction()) {
			t.Fatalf("AlarmAction: %d of %v", action, alarm)
		}
		txn := new(pb.TxnRequest)
		var got, want operations
		if accepted("EachOperation", EachOperation(msg, &got), txn) {
			want.of(txn)
			slices.Sort(got) // the branches may be interleaved
			slices.Sort(want)
			if !slices.Equal(got, want) {
				t.Fatalf("EachOperation: %q of %v", got, txn)
			}
		}
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
		asked, err := WatchRequest(msg, rules)
		create := request.GetCreateRequest
		if accepted("WatchRequest", err, request) && (asked.Creates != (create() != nil) || asked.Fragments != create().GetFragment() ||
			create() != nil && !asked.Touches && rules.Overlaps(create().GetKey(), create().GetRangeEnd())) {
			t.Fatalf("WatchRequest: %+v of %v", asked, request)
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

// operations are those of a transaction, as text.
type operations []string

func (o *operations) Range(key, end []byte)  { *o = append(*o, fmt.Sprintf("range %q %q", key, end)) }
func (o *operations) Put(key []byte)         { *o = append(*o, fmt.Sprintf("put %q", key)) }
func (o *operations) Delete(key, end []byte) { *o = append(*o, fmt.Sprintf("delete %q %q", key, end)) }

func (o *operations) of(txn *pb.TxnRequest) {
	for _, op := range slices.Concat(txn.GetSuccess(), txn.GetFailure()) {
		switch {
		case op.GetRequestRange() != nil:
			o.Range(op.GetRequestRange().GetKey(), op.GetRequestRange().GetRangeEnd())
		case op.GetRequestPut() != nil:
			o.Put(op.GetRequestPut().GetKey())
		case op.GetRequestDeleteRange() != nil:
			o.Delete(op.GetRequestDeleteRange().GetKey(), op.GetRequestDeleteRange().GetRangeEnd())
		case op.GetRequestTxn() != nil:
			o.of(op.GetRequestTxn())
		}
	}
}

// unsealing takes the brackets off where a request's rewriter puts them on.
type unsealing struct{ brackets }

func (o unsealing) Seal(dst, key, stored []byte) ([]byte, error) {
	return o.Open(dst, key, stored)
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
