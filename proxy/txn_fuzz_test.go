package proxy

import (
	"context"
	"fmt"
	"math/rand/v2"
	"sync/atomic"
	"testing"

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

// TestTxnProgramsOverGRPC runs some with clients, an engine and etcd's end of gRPC around the rewriter.
func TestTxnProgramsOverGRPC(t *testing.T) {
	t.Parallel()
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
	first := rand.Uint64() >> 1
	for i := range uint64(50) {
		w := newWorld(t)
		w.core = p.core // one way to seal
		w.via = func(ctx context.Context, name string, request proto.Message) (proto.Message, error) {
			answer := proto.Clone(kvMethods[name].answer)
			return answer, conn.Invoke(ctx, "/etcdserverpb.KV/"+name, request, answer)
		}
		now.Store(w)
		_ = etcdmodel.NewProgram(randomProgram(first+i)).Run(w.bare.Rev, w.step)
		if sameStored(t, w.core.rules.Load(), w.bare, w.behind); t.Failed() {
			t.Fatalf("seed %d", first+i)
		}
	}
}

func FuzzTxn(f *testing.F) {
	for seed := range uint64(40) {
		f.Add(randomProgram(seed))
	}
	f.Fuzz(func(t *testing.T, program []byte) { runProgram(t, program) })
}
