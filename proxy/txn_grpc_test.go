package proxy

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdmodel"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// systemRules are rules whose values anyone can check.
func systemRules() []etcdapi.Rule {
	first, second := proxytest.NewScramblers()
	return []etcdapi.Rule{{Prefix: "s/", Sealer: first}, {Prefix: "s/p/", Sealer: second}}
}

// overGRPC returns a function that runs steps with a client, the proxy and etcd's end of gRPC, and
// compares what is stored in the end.
func overGRPC(t *testing.T) func(t *testing.T, steps func(*proxytest.World)) {
	var now atomic.Pointer[proxytest.World]
	etcd := proxytest.ServeAll(t, func(_ any, ss grpc.ServerStream) error {
		full, _ := grpc.MethodFromServerStream(ss)
		in := new(rpc.Message)
		if err := ss.RecvMsg(in); err != nil {
			return err
		}
		defer in.Free()
		out, err := now.Load().Ask(ss.Context(), full, in.Data.Materialize(), 0)
		if err != nil {
			return err
		}
		return ss.SendMsg(rpc.NewMessage(out))
	})
	p := startProxy(t, etcd, systemRules(), func(c *Config) { c.OwnPrefixes = proxytest.WorldsOwn })
	conn := p.dial(t)
	return func(t *testing.T, steps func(*proxytest.World)) {
		w := proxytest.NewWorld(t, p.core.Rules.Load()) // one way to seal
		w.Via = func(ctx context.Context, name string, request proto.Message) (proto.Message, error) {
			answer := proto.Clone(proxytest.KvMethods[name].Answer)
			return answer, conn.Invoke(ctx, "/etcdserverpb.KV/"+name, request, answer)
		}
		now.Store(w)
		steps(w)
		proxytest.SameStored(t, w.Rules, w.Bare, w.Behind)
	}
}

// TestTxnProgramsOverGRPC runs some over the proxy.
func TestTxnProgramsOverGRPC(t *testing.T) {
	t.Parallel()
	run := overGRPC(t)
	first := rand.Uint64() >> 1
	for i := range uint64(50) {
		if !t.Run(fmt.Sprint(first+i), func(t *testing.T) {
			run(t, func(w *proxytest.World) {
				_ = etcdmodel.NewProgram(proxytest.RandomProgram(first+i)).Run(w.Bare.Rev, w.Step)
			})
		}) {
			break
		}
	}
}

// TestTxnThatIsExchanged has an engine serve transactions that lead to requests of the proxy's own,
// with puts in them: each value is encrypted once.
func TestTxnThatIsExchanged(t *testing.T) {
	put := func(key string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte("a")}}}
	}
	all := &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte("s/c"), RangeEnd: []byte{0}}}}
	byValue := &pb.Compare{Key: []byte("s/a"), Target: pb.Compare_VALUE, Result: pb.Compare_NOT_EQUAL, TargetUnion: &pb.Compare_Value{Value: []byte("b")}}
	nested := &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Success: []*pb.RequestOp{put("s/b"), all}}}}
	run := overGRPC(t)
	for name, txn := range map[string]*pb.TxnRequest{
		"a delete that reaches over own keys":   {Success: []*pb.RequestOp{put("s/a"), all}},
		"such a delete in a nested transaction": {Success: []*pb.RequestOp{put("s/a"), nested}},
		"a compare of a value":                  {Compare: []*pb.Compare{byValue}, Success: []*pb.RequestOp{put("s/a")}},
		"both":                                  {Compare: []*pb.Compare{byValue}, Success: []*pb.RequestOp{put("s/a"), all}},
	} {
		t.Run(name, func(t *testing.T) {
			run(t, func(w *proxytest.World) { _ = w.Step(etcdmodel.Step{Request: txn}) })
		})
	}
}
