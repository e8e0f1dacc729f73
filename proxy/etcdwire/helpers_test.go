package etcdwire

import (
	"bytes"
	"errors"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// brackets is a reversible stand-in for sealing: "[key|value]", for keys under a prefix.
type brackets struct{ prefix string }

var errOpen = errors.New("value is not bracketed")

func (b brackets) covers(key []byte) bool { return bytes.HasPrefix(key, []byte(b.prefix)) }

func (b brackets) Overlaps(key, rangeEnd []byte) bool {
	if len(rangeEnd) == 0 {
		return b.covers(key)
	}
	fromKey := len(rangeEnd) == 1 && rangeEnd[0] == 0
	after := append([]byte(b.prefix), 0xff, 0xff)
	return bytes.Compare(key, after) < 0 && (fromKey || bytes.Compare(rangeEnd, []byte(b.prefix)) > 0)
}

func (b brackets) Covers(key []byte) bool { return b.covers(key) }

func (b brackets) Seal(dst, key, value []byte) ([]byte, error) {
	if !b.covers(key) {
		return nil, nil
	}
	return append(dst, bytes.Join([][]byte{{'['}, key, {'|'}, value, {']'}}, nil)...), nil
}

func (b brackets) Open(dst, key, stored []byte) ([]byte, error) {
	if !b.covers(key) {
		return append(dst, stored...), nil
	}
	head := append(append([]byte{'['}, key...), '|')
	if !bytes.HasPrefix(stored, head) || !bytes.HasSuffix(stored, []byte("]")) {
		return nil, errOpen
	}
	return append(dst, stored[len(head):len(stored)-1]...), nil
}

// untouched changes nothing and counts what it is asked.
type untouched struct{ seals, opens int }

func (*untouched) Overlaps(_, _ []byte) bool { return false }

func (u *untouched) Covers([]byte) bool {
	u.seals++
	return u.seals%2 == 0 // a rule may cover the key, and leave the value
}

func (u *untouched) Seal(_, _, _ []byte) ([]byte, error) { return nil, nil }

func (u *untouched) Open(dst, _, stored []byte) ([]byte, error) {
	u.opens++
	return append(dst, stored...), nil
}

// same reports whether b is the very slice a.
func same(a, b []byte) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}

func wire(t testing.TB, m proto.Message) []byte {
	t.Helper()
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func decode[M proto.Message](t testing.TB, b []byte, m M) M {
	t.Helper()
	if err := proto.Unmarshal(b, m); err != nil {
		t.Fatalf("decode %T: %v", m, err)
	}
	return m
}

func kv(key, value string) *mvccpb.KeyValue {
	return &mvccpb.KeyValue{Key: []byte(key), Value: []byte(value), CreateRevision: 3, ModRevision: 300, Version: 2, Lease: 77}
}

func put(key, value string) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte(value), Lease: 9, PrevKv: true}}}
}

func rng(r *pb.RangeRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}}
}

func nested(r *pb.TxnRequest) *pb.RequestOp {
	return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: r}}
}

func answers(succeeded bool, ops ...*pb.ResponseOp) *pb.TxnResponse {
	return &pb.TxnResponse{Header: &pb.ResponseHeader{Revision: 5}, Succeeded: succeeded, Responses: ops}
}

func ranged(kvs ...*mvccpb.KeyValue) *pb.ResponseOp {
	return &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: &pb.RangeResponse{Kvs: kvs, Count: 1}}}
}
