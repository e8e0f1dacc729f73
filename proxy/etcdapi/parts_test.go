package etcdapi

import (
	"bytes"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/mem"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// framed is msg as grpc hands it out, in buffers of a size.
func framed(msg []byte, size int) *rpc.Message {
	f := new(rpc.Message)
	for len(msg) > 0 {
		n := min(size, len(msg))
		f.Data = append(f.Data, mem.SliceBuffer(msg[:n]))
		msg = msg[n:]
	}
	return f
}

// longList is an answer whose values are encrypted by a reverser, one of them longer than a part,
// and what a client shall see of it.
func longList(t *testing.T, r *rand.Rand) (stored, want []byte) {
	t.Helper()
	plain, sealed := new(pb.RangeResponse), new(pb.RangeResponse)
	plain.Header, plain.Count, plain.More = &pb.ResponseHeader{Revision: 7}, 12345, true
	long := r.IntN(200)
	for i := range 200 {
		size := r.IntN(4000)
		if i == long {
			size = 3*rpc.PartSize + r.IntN(100)
		}
		key := fmt.Sprintf("/r/%d", i)
		if i%7 == 0 {
			key = fmt.Sprintf("/other/%d", i)
		}
		value := bytes.Repeat([]byte{byte(i)}, size)
		plain.Kvs = append(plain.Kvs, &mvccpb.KeyValue{Key: []byte(key), Value: value, ModRevision: int64(i)})
		in := value
		if i%7 != 0 {
			var err error
			if in, err = (proxytest.Reverser{}).Seal(t.Context(), nil, []byte(key), value); err != nil {
				t.Fatal(err)
			}
		}
		sealed.Kvs = append(sealed.Kvs, &mvccpb.KeyValue{Key: []byte(key), Value: in, ModRevision: int64(i)})
	}
	sealed.Header, sealed.Count, sealed.More = plain.Header, plain.Count, plain.More
	marshal := func(m proto.Message) []byte {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	return marshal(sealed), marshal(plain)
}

// newRange is a call for all keys, with a rule on those below /r/.
func newRange(t *testing.T) Call {
	t.Helper()
	set, err := NewRuleSet([]Rule{{Prefix: "/r/", Sealer: proxytest.Reverser{}}})
	if err != nil {
		t.Fatal(err)
	}
	c := NewCore(set, 1<<20, slog.New(slog.DiscardHandler))
	call := newRangeCall(c, new(listener.Identity), new(CallMemory))
	if _, err := call.Request(NonBlocking, []byte("\x0a\x01\x00\x12\x01\x00")); err != nil {
		t.Fatal(err)
	}
	return call
}

// TestReplaceParts: an answer in parts is what it is as a whole, however grpc cut it.
func TestReplaceParts(t *testing.T) {
	r := rand.New(rand.NewPCG(1, 2))
	for range 20 {
		stored, want := longList(t, r)
		original := bytes.Clone(stored)
		c := newRange(t)
		parts := 0
		f := framed(stored, 1+r.IntN(40000))
		err := f.Replace(!c.Parts(), func(dst, b []byte) ([]byte, error) {
			parts++
			return c.Response(NonBlocking, dst, b)
		})
		if err != nil {
			t.Fatal(err)
		}
		if got := f.Data.Materialize(); !bytes.Equal(got, want) {
			t.Fatalf("the parts are %d bytes that differ from the %d wanted", len(got), len(want))
		}
		if parts < 5 {
			t.Errorf("only %d parts of %d bytes", parts, len(stored))
		}
		if !bytes.Equal(stored, original) {
			t.Fatal("grpc's buffers were written to")
		}
		f.Free()
	}
}

// TestReplacePartsOfDamage: whatever is wrong with an answer is found in parts, too, and never more
// than in the whole.
func TestReplacePartsOfDamage(t *testing.T) {
	r := rand.New(rand.NewPCG(3, 4))
	stored, _ := longList(t, r)
	for range 300 {
		bad := bytes.Clone(stored)
		switch r.IntN(3) {
		case 0:
			bad = bad[:r.IntN(len(bad))]
		case 1:
			bad[r.IntN(len(bad))] ^= 1 << r.IntN(8)
		case 2:
			at := r.IntN(len(bad))
			bad = append(bad[:at], bad[min(at+1+r.IntN(30), len(bad)):]...)
		}
		c := newRange(t)
		inParts, whole := framed(bad, 16<<10), framed(bad, 16<<10)
		respond := func(dst, b []byte) ([]byte, error) { return c.Response(NonBlocking, dst, b) }
		errParts, errWhole := inParts.Replace(false, respond), whole.Replace(true, respond)
		// A field that may stand there once is looked for in each part only.
		if errParts != nil && errWhole == nil {
			t.Errorf("an error in parts only: %v", errParts)
		}
		if errParts == nil && errWhole == nil && !bytes.Equal(inParts.Data.Materialize(), whole.Data.Materialize()) {
			t.Error("the results differ")
		}
		if errParts == nil && errWhole != nil && !bytes.Contains([]byte(errWhole.Error()), []byte("occurs twice")) {
			t.Errorf("in parts it passes: %v", errWhole)
		}
		inParts.Free()
		whole.Free()
	}
}
