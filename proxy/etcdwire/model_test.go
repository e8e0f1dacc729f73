package etcdwire

import (
	"errors"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// The model decodes a message, edits the decoded values and encodes it again: what the rewriter
// must agree with.

type modelEdit func(key, value []byte) ([]byte, error)

func sealing(r Rules) modelEdit {
	return func(k, v []byte) ([]byte, error) {
		out, err := r.Seal([]byte{}, k, v)
		if out == nil && err == nil {
			out = v
		}
		return out, err
	}
}

func opening(r Rules) modelEdit {
	return func(k, v []byte) ([]byte, error) { return r.Open(nil, k, v) }
}

func modelPut(p *pb.PutRequest, edit modelEdit) (err error) {
	if p != nil && !p.IgnoreValue {
		p.Value, err = edit(p.Key, p.Value)
	}
	return err
}

func modelTxn(t *pb.TxnRequest, edit modelEdit) error {
	for _, op := range append(append([]*pb.RequestOp{}, t.GetSuccess()...), t.GetFailure()...) {
		if err := errors.Join(modelPut(op.GetRequestPut(), edit), modelTxn(op.GetRequestTxn(), edit)); err != nil {
			return err
		}
	}
	return nil
}

func modelKVs(edit modelEdit, kvs ...*mvccpb.KeyValue) error {
	for _, kv := range kvs {
		if kv == nil || (len(kv.Value) == 0 && kv.Version == 0) {
			continue
		}
		v, err := edit(kv.Key, kv.Value)
		if err != nil {
			return err
		}
		kv.Value = v
	}
	return nil
}

func modelAnswers(t *pb.TxnResponse, edit modelEdit) error {
	for _, op := range t.GetResponses() {
		err := errors.Join(modelKVs(edit, op.GetResponseRange().GetKvs()...), modelKVs(edit, op.GetResponsePut().GetPrevKv()),
			modelKVs(edit, op.GetResponseDeleteRange().GetPrevKvs()...), modelAnswers(op.GetResponseTxn(), edit))
		if err != nil {
			return err
		}
	}
	return nil
}

// method is one rewriter beside its model.
type method struct {
	name    string
	message func() proto.Message
	rewrite func(msg []byte, rules Rules) ([]byte, error)
	model   func(m proto.Message, rules Rules) error
	answer  bool // it may overwrite its message, and sealing what it opened gives the message back
}

var methods = []method{
	{"PutRequest", func() proto.Message { return new(pb.PutRequest) },
		func(b []byte, r Rules) ([]byte, error) { return PutRequest(nil, b, r) },
		func(m proto.Message, r Rules) error { return modelPut(m.(*pb.PutRequest), sealing(r)) }, false},
	{"TxnRequest", func() proto.Message { return new(pb.TxnRequest) },
		func(b []byte, r Rules) ([]byte, error) { out, _, err := TxnRequest(nil, b, r); return out, err },
		func(m proto.Message, r Rules) error { return modelTxn(m.(*pb.TxnRequest), sealing(r)) }, false},
	{"RangeResponse", func() proto.Message { return new(pb.RangeResponse) },
		func(b []byte, r Rules) ([]byte, error) {
			return RangeResponse(make([]byte, 0, len(b)), b, r, RangeShape{})
		},
		func(m proto.Message, r Rules) error { return modelKVs(opening(r), m.(*pb.RangeResponse).Kvs...) }, true},
	{"RangeStreamResponse", func() proto.Message { return new(pb.RangeStreamResponse) },
		func(b []byte, r Rules) ([]byte, error) {
			return RangeStreamResponse(make([]byte, 0, len(b)), b, r, RangeShape{})
		},
		func(m proto.Message, r Rules) error {
			return modelKVs(opening(r), m.(*pb.RangeStreamResponse).GetRangeResponse().GetKvs()...)
		}, true},
	{"PutResponse", func() proto.Message { return new(pb.PutResponse) },
		func(b []byte, r Rules) ([]byte, error) { return PutResponse(make([]byte, 0, len(b)), b, r) },
		func(m proto.Message, r Rules) error { return modelKVs(opening(r), m.(*pb.PutResponse).PrevKv) }, true},
	{"DeleteRangeResponse", func() proto.Message { return new(pb.DeleteRangeResponse) },
		func(b []byte, r Rules) ([]byte, error) { return DeleteRangeResponse(make([]byte, 0, len(b)), b, r) },
		func(m proto.Message, r Rules) error {
			return modelKVs(opening(r), m.(*pb.DeleteRangeResponse).PrevKvs...)
		}, true},
	{"TxnResponse", func() proto.Message { return new(pb.TxnResponse) },
		func(b []byte, r Rules) ([]byte, error) { return TxnResponse(make([]byte, 0, len(b)), b, r, nil) },
		func(m proto.Message, r Rules) error { return modelAnswers(m.(*pb.TxnResponse), opening(r)) }, true},
	{"WatchResponse", func() proto.Message { return new(pb.WatchResponse) },
		func(b []byte, r Rules) ([]byte, error) { return WatchResponse(make([]byte, 0, len(b)), b, r) },
		func(m proto.Message, r Rules) error {
			for _, e := range m.(*pb.WatchResponse).Events {
				if e.Type == mvccpb.Event_PUT || len(e.GetKv().GetValue()) > 0 {
					if err := modelKVs(opening(r), e.Kv); err != nil {
						return err
					}
				}
				if err := modelKVs(opening(r), e.PrevKv); err != nil {
					return err
				}
			}
			return nil
		}, true},
}

// samples are messages of each kind with keys on both sides of the rule "s/".
func samples() map[string][]proto.Message {
	sealed, plain := kv("s/a", "[s/a|one]"), kv("p/b", "two")
	empty := kv("s/e", "[s/e|]")
	deleted := &mvccpb.KeyValue{Key: []byte("s/a"), ModRevision: 9}
	txn := &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: []byte("s/a"), Target: pb.Compare_MOD, TargetUnion: &pb.Compare_ModRevision{ModRevision: 4}}},
		Success: []*pb.RequestOp{put("s/a", "one"), put("p/b", "two"), nested(&pb.TxnRequest{Success: []*pb.RequestOp{put("s/x", "deep")}, Failure: []*pb.RequestOp{put("s/y", "")}})},
		Failure: []*pb.RequestOp{rng(&pb.RangeRequest{Key: []byte("s/a"), KeysOnly: true}), put("s/z", "other")},
	}
	all := &pb.RangeResponse{Header: &pb.ResponseHeader{ClusterId: 1, MemberId: 2, Revision: 3, RaftTerm: 4}, Kvs: []*mvccpb.KeyValue{sealed, plain, empty}, More: true, Count: 7}
	prev := &pb.PutResponse{PrevKv: sealed}
	gone := &pb.DeleteRangeResponse{Deleted: 2, PrevKvs: []*mvccpb.KeyValue{sealed, plain, deleted}}
	return map[string][]proto.Message{
		"PutRequest":          {&pb.PutRequest{Key: []byte("s/a"), Value: []byte("v"), Lease: 3}, &pb.PutRequest{Key: []byte("s/a"), Lease: 3}, &pb.PutRequest{Key: []byte("s/a"), IgnoreValue: true}, &pb.PutRequest{Key: []byte("p/a"), Value: []byte("v")}, &pb.PutRequest{}},
		"TxnRequest":          {txn, &pb.TxnRequest{}, &pb.TxnRequest{Success: []*pb.RequestOp{{}}}},
		"RangeResponse":       {all, &pb.RangeResponse{}},
		"RangeStreamResponse": {&pb.RangeStreamResponse{RangeResponse: all}, &pb.RangeStreamResponse{}},
		"PutResponse":         {prev, &pb.PutResponse{Header: all.Header}},
		"DeleteRangeResponse": {gone},
		"TxnResponse": {answers(true, ranged(sealed, plain), &pb.ResponseOp{Response: &pb.ResponseOp_ResponsePut{ResponsePut: prev}},
			&pb.ResponseOp{Response: &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: gone}},
			&pb.ResponseOp{Response: &pb.ResponseOp_ResponseTxn{ResponseTxn: answers(false, ranged(sealed))}})},
		"WatchResponse": {&pb.WatchResponse{Header: all.Header, WatchId: 5, Events: []*mvccpb.Event{
			{Kv: sealed, PrevKv: empty}, {Type: mvccpb.Event_DELETE, Kv: deleted, PrevKv: sealed}, {Kv: plain},
		}}, &pb.WatchResponse{WatchId: -1, Created: true}},
	}
}
