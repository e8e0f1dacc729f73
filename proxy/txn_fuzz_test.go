package proxy

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdmodel"
)

// randomProgram is the same for the same seed.
func randomProgram(seed uint64) []byte {
	random := rand.New(rand.NewPCG(seed, 0))
	program := make([]byte, 10+random.IntN(200))
	for i := range program {
		program[i] = byte(random.Uint32())
	}
	return program
}

// runProgram has a program get the same answers and errors through the proxy as from etcd alone, and leave the same behind, while others write between the requests that one transaction leads to. etcd
// sees no value under a rule, and compares and sorts none.
func runProgram(tb testing.TB, program []byte) {
	defer func() {
		if tb.Failed() {
			tb.Logf("to run it again, put this into testdata/fuzz/FuzzTxn:\ngo test fuzz v1\n[]byte(%q)", program)
		}
	}()
	w := newWorld(tb)
	_ = etcdmodel.NewProgram(program).Run(w.bare.Rev, w.step) // a difference ends the test
	sameStored(tb, w.core.rules.Load(), w.bare, w.behind)
}

// TestTxnPrograms runs programs at random.
func TestTxnPrograms(t *testing.T) {
	t.Parallel()
	first := rand.Uint64() >> 1
	for i := range uint64(1000) {
		seed := first + i
		t.Run(fmt.Sprint(seed), func(t *testing.T) { runProgram(t, randomProgram(seed)) })
	}
}

// overGRPC returns a function that runs steps with a client, an engine and etcd's end of gRPC around
// the rewriter, and compares what is stored in the end.
func overGRPC(t *testing.T) func(t *testing.T, steps func(*world)) {
	var now atomic.Pointer[world]
	etcd := serveAll(t, func(_ any, ss grpc.ServerStream) error {
		full, _ := grpc.MethodFromServerStream(ss)
		in := new(frame)
		if err := ss.RecvMsg(in); err != nil {
			return err
		}
		defer in.free()
		out, err := now.Load().ask(ss.Context(), full, in.data.Materialize(), 0)
		if err != nil {
			return err
		}
		return ss.SendMsg(&frame{data: mem.BufferSlice{mem.SliceBuffer(out)}})
	})
	p := startProxy(t, etcd, scrambling(), func(c *Config) { c.OwnPrefixes = worldsOwn })
	conn := p.dial(t)
	return func(t *testing.T, steps func(*world)) {
		w := newWorld(t)
		w.core = p.core // one way to seal
		w.via = func(ctx context.Context, name string, request proto.Message) (proto.Message, error) {
			answer := proto.Clone(kvMethods[name].answer)
			return answer, conn.Invoke(ctx, "/etcdserverpb.KV/"+name, request, answer)
		}
		now.Store(w)
		steps(w)
		sameStored(t, w.core.rules.Load(), w.bare, w.behind)
	}
}

// TestTxnProgramsOverGRPC runs some over an engine.
func TestTxnProgramsOverGRPC(t *testing.T) {
	t.Parallel()
	run := overGRPC(t)
	first := rand.Uint64() >> 1
	for i := range uint64(50) {
		if !t.Run(fmt.Sprint(first+i), func(t *testing.T) {
			run(t, func(w *world) { _ = etcdmodel.NewProgram(randomProgram(first+i)).Run(w.bare.Rev, w.step) })
		}) {
			break
		}
	}
}

func FuzzTxn(f *testing.F) {
	for seed := range uint64(40) {
		f.Add(randomProgram(seed))
	}
	f.Fuzz(func(t *testing.T, program []byte) { runProgram(t, program) })
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
			run(t, func(w *world) { _ = w.step(etcdmodel.Step{Request: txn}) })
		})
	}
}
