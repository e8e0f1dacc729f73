package proxy

import (
	"context"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
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

// TestTxnProgramsOverGRPC runs some with clients, an engine and etcd's end of gRPC around the rewriter.
func TestTxnProgramsOverGRPC(t *testing.T) {
	t.Parallel()
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
		return ss.SendMsg(&rpc.Message{Data: mem.BufferSlice{mem.SliceBuffer(out)}})
	})
	p := startProxy(t, etcd, systemRules(), func(c *Config) { c.OwnPrefixes = proxytest.WorldsOwn })
	conn := p.dial(t)
	first := rand.Uint64() >> 1
	for i := range uint64(50) {
		w := proxytest.NewWorld(t, p.core.Rules.Load()) // one way to seal
		w.Via = func(ctx context.Context, name string, request proto.Message) (proto.Message, error) {
			answer := proto.Clone(proxytest.KvMethods[name].Answer)
			return answer, conn.Invoke(ctx, "/etcdserverpb.KV/"+name, request, answer)
		}
		now.Store(w)
		_ = etcdmodel.NewProgram(proxytest.RandomProgram(first+i)).Run(w.Bare.Rev, w.Step)
		if proxytest.SameStored(t, w.Rules, w.Bare, w.Behind); t.Failed() {
			t.Fatalf("seed %d", first+i)
		}
	}
}
