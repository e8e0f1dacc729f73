package proxy

import (
	"bytes"
	"context"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/protobuf/proto"
)

// TestPutThatKeepsItsValueAndHasOne: etcd refuses it, and must not see the value first. Alone it is
// refused with etcd's own error; in a transaction, where etcd has to say what is wrong first,
// another value is in its place.
func TestPutThatKeepsItsValueAndHasOne(t *testing.T) {
	const secret = "canary-value"
	var sent []proto.Message
	etcd := serveFake(t, &fakeEtcd{
		putFn: func(_ context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
			sent = append(sent, r)
			return &pb.PutResponse{}, nil
		},
		txnFn: func(_ context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
			sent = append(sent, r)
			return nil, rpctypes.ErrGRPCValueProvided
		},
	})
	bothWays(t, func(t *testing.T, startProxy starter) {
		kv := pb.NewKVClient(startProxy(t, etcd, []Rule{{Prefix: "s/", Sealer: reverser{}}}, nil).dial(t))
		put := func(key string) *pb.PutRequest {
			return &pb.PutRequest{Key: []byte(key), Value: []byte(secret), IgnoreValue: true}
		}
		sent = nil
		_, err := kv.Put(testContext(t), put("s/k"))
		sameStatus(t, err, rpctypes.ErrGRPCValueProvided)
		if len(sent) > 0 {
			t.Errorf("it reached etcd: %v", sent)
		}
		op := &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put("s/k")}}
		nested := &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Failure: []*pb.RequestOp{op}}}}
		for _, txn := range []*pb.TxnRequest{{Success: []*pb.RequestOp{op}}, {Failure: []*pb.RequestOp{nested}}} {
			_, err = kv.Txn(testContext(t), txn)
			sameStatus(t, err, rpctypes.ErrGRPCValueProvided)
		}
		if len(sent) != 2 {
			t.Errorf("%d transactions reached etcd", len(sent))
		}
		for _, m := range sent {
			if b, err := proto.Marshal(m); err != nil || bytes.Contains(b, []byte(secret)) {
				t.Errorf("etcd was sent the value: %v, %v", m, err)
			}
		}
		// A key under no rule is etcd's business, as is a put that is wrong in the same way and has
		// no value.
		sent = nil
		empty := put("s/k")
		empty.Value = nil
		for _, r := range []*pb.PutRequest{put("e/k"), empty} {
			if _, err := kv.Put(testContext(t), r); err != nil {
				t.Error(err)
			}
		}
		if len(sent) != 2 || !proto.Equal(sent[0], put("e/k")) || !proto.Equal(sent[1], empty) {
			t.Errorf("etcd was sent %v", sent)
		}
	})
	// What is wrong first is said first.
	w := newWorld(t)
	w.core.rules.Store(mustRules(t, everything))
	for _, r := range []*pb.PutRequest{
		{Value: []byte(secret), IgnoreValue: true},
		{Key: []byte("k"), Value: []byte(secret), IgnoreValue: true, IgnoreLease: true, Lease: 1},
	} {
		_, want := w.bare.Do(r)
		_, err := w.through(t.Context(), "Put", r)
		sameStatus(t, err, want)
	}
}

func mustRules(t *testing.T, rules []Rule) *ruleSet {
	t.Helper()
	set, err := newRuleSet(rules)
	if err != nil {
		t.Fatal(err)
	}
	return set
}
