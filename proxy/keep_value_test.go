package proxy

import (
	"bytes"
	"context"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
)

// TestPutThatKeepsItsValueAndHasOne: etcd refuses it, and must not see the value first. Alone it is
// refused with etcd's own error; in a transaction, where etcd has to say what is wrong first,
// another value is in its place.
func TestPutThatKeepsItsValueAndHasOne(t *testing.T) {
	const secret = "canary-value"
	var sent []proto.Message
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{
		PutFn: func(_ context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
			sent = append(sent, r)
			return &pb.PutResponse{}, nil
		},
		TxnFn: func(_ context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
			sent = append(sent, r)
			return nil, rpctypes.ErrGRPCValueProvided
		},
	})
	bothWays(t, func(t *testing.T, startProxy starter) {
		kv := pb.NewKVClient(startProxy(t, etcd, []etcdapi.Rule{{Prefix: "s/", Sealer: proxytest.Reverser{}}}, nil).dial(t))
		put := func(key string) *pb.PutRequest {
			return &pb.PutRequest{Key: []byte(key), Value: []byte(secret), IgnoreValue: true}
		}
		sent = nil
		_, err := kv.Put(proxytest.TestContext(t), put("s/k"))
		proxytest.SameStatus(t, err, rpctypes.ErrGRPCValueProvided)
		if len(sent) > 0 {
			t.Errorf("it reached etcd: %v", sent)
		}
		op := &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put("s/k")}}
		nested := &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Failure: []*pb.RequestOp{op}}}}
		for _, txn := range []*pb.TxnRequest{{Success: []*pb.RequestOp{op}}, {Failure: []*pb.RequestOp{nested}}} {
			_, err = kv.Txn(proxytest.TestContext(t), txn)
			proxytest.SameStatus(t, err, rpctypes.ErrGRPCValueProvided)
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
			if _, err := kv.Put(proxytest.TestContext(t), r); err != nil {
				t.Error(err)
			}
		}
		if len(sent) != 2 || !proto.Equal(sent[0], put("e/k")) || !proto.Equal(sent[1], empty) {
			t.Errorf("etcd was sent %v", sent)
		}
	})
}
