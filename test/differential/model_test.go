package differential

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdmodel"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestModel compares the model of etcd that package proxy is fuzzed against with etcd itself: the
// programs of the fuzzer must get the same responses and errors from both, and leave the same keys.
func TestModel(t *testing.T) {
	t.Parallel()
	env := harness.New(t)
	etcd := env.StartEtcd(harness.EtcdConfig{Bare: true, Flags: []string{"--unsafe-no-fsync", fmt.Sprint("--max-txn-ops=", etcdmodel.MaxOps)}})
	real := newSide(env, "etcd", harness.Dial(t, etcd.Address, nil))
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	for _, id := range etcdmodel.Leases {
		if a := real.do(ctx, &pb.LeaseGrantRequest{ID: id, TTL: 3600}); a.err != nil {
			t.Fatal(a.err)
		}
	}
	model := etcdmodel.New(etcdmodel.MaxOps, etcdmodel.Leases...)
	// Starting etcd wrote a key; every program begins with an empty store.
	first := &pb.PutRequest{Key: []byte("first")}
	for now := real.do(ctx, first).message.(*pb.PutResponse).Header.Revision; model.Rev() < now; {
		if _, err := model.Do(first); err != nil {
			t.Fatal(err)
		}
	}
	var trace []string
	counts := map[string]int{}
	do := func(request proto.Message) error {
		trace = append(trace, describe(request))
		a := real.do(ctx, request)
		if h, ok := a.message.(interface{ GetHeader() *pb.ResponseHeader }); ok {
			h.GetHeader().ClusterId, h.GetHeader().MemberId = 0, 0
		}
		message, err := model.Do(request)
		if b := (answer{message: message, err: status.Convert(err), header: a.header, trailer: a.trailer}); !a.same(b) {
			for _, step := range trace {
				t.Log(step)
			}
			return fmt.Errorf("etcd:  %v\nmodel: %v", a, b)
		}
		kind := fmt.Sprintf("%T", request)
		if a.err != nil {
			kind += " " + a.err.Message()
		}
		counts[kind]++
		return nil
	}
	all := &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}}
	programs := setting(t, "DIFFERENTIAL_SEQUENCES", map[bool]uint64{true: 400, false: 2000}[testing.Short()])
	seed := setting(t, "DIFFERENTIAL_SEED", rand.Uint64()>>1)
	for i := range programs {
		trace = trace[:0]
		random := rand.New(rand.NewPCG(seed+i, 0))
		bytes := make([]byte, random.IntN(400))
		for i := range bytes {
			bytes[i] = byte(random.Uint32())
		}
		err := do(&pb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
		if err == nil {
			err = etcdmodel.NewProgram(bytes).Run(model.Rev, func(s etcdmodel.Step) error {
				for _, w := range s.Between {
					if err := do(w.Request); err != nil {
						return err
					}
				}
				return do(s.Request)
			})
		}
		if err == nil {
			err = do(all)
		}
		if err != nil {
			t.Fatalf("seed %d: %v", seed+i, err)
		}
	}
	t.Log(counts)
	for _, kind := range []string{"*etcdserverpb.TxnRequest", "*etcdserverpb.PutRequest", "*etcdserverpb.RangeRequest", "*etcdserverpb.TxnRequest etcdserver: duplicate key given in txn request", "*etcdserverpb.TxnRequest etcdserver: too many operations in txn request"} {
		if counts[kind] < int(programs)/20 {
			t.Errorf("only %d of %s: this proves little", counts[kind], kind)
		}
	}
}
