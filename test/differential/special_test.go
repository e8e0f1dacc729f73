package differential

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestSpecialCases sends requests that random sequences rarely or never contain. They share one
// bench with rules for half of the keys.
func TestSpecialCases(t *testing.T) {
	t.Parallel()
	b := newBench(t, "3.7", ruleSets[1])
	t.Run("compares by VALUE around the limits", b.byValue)
	t.Run("requests around the size limits", b.sizes)
	t.Run("a large watch response, whole and in fragments", b.fragments)
	t.Run("a long list", b.longList)
	t.Run("a half-closed watch goes on", b.halfClose)
	t.Run("a key that expires with its lease", b.expiry)
	t.Run("deadlines and canceled calls", b.deadlines)
	t.Run("what cannot be decoded goes no further", b.malformed)
	t.Run("strict rules refuse injected values", b.injected)
	t.Run("every method of the server is known", b.everyMethod)
	t.Run("metadata", b.metadata)
	t.Run("users and permissions", b.users) // the last one, because it turns authentication on
	b.checkFiles(t, "/s/fragment")
}

// byValue tests compares by VALUE near etcd's limit of 128 operations, of which the proxy needs
// some itself.
func (b *bench) byValue(t *testing.T) {
	ctx := t.Context()
	p := b.pair(t)
	value := []byte(b.env.Sealed.Value("v"))
	for i := range 3 {
		p.do(ctx, &pb.PutRequest{Key: fmt.Appendf(nil, "/s/%d", i), Value: value})
	}
	p.do(ctx, &pb.PutRequest{Key: []byte("/u/clear"), Value: []byte(b.env.Clear.Value("c"))})
	compare := func(key, end string, result pb.Compare_CompareResult) *pb.Compare {
		return &pb.Compare{Key: []byte(key), RangeEnd: []byte(end), Result: result, Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: value}}
	}
	puts := func(n int, prefix string) (ops []*pb.RequestOp) {
		for i := range n {
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: fmt.Appendf(nil, "%s%d", prefix, i), Value: value}}})
		}
		return ops
	}
	for _, n := range []int{1, 100, 126, 127, 128, 129} {
		for _, result := range []pb.Compare_CompareResult{pb.Compare_EQUAL, pb.Compare_NOT_EQUAL} {
			one := []*pb.Compare{compare("/s/0", "", result)}
			var many []*pb.Compare
			for i := range n {
				many = append(many, compare(fmt.Sprintf("/s/%d", i%3), "", result))
			}
			p.do(ctx, &pb.TxnRequest{Compare: many, Success: puts(1, "/t/a"), Failure: puts(1, "/t/b")})
			p.do(ctx, &pb.TxnRequest{Compare: one, Success: puts(n, "/t/a"), Failure: puts(1, "/t/b")})
			p.do(ctx, &pb.TxnRequest{Compare: one, Success: puts(1, "/t/a"), Failure: puts(n, "/t/b")})
			p.do(ctx, &pb.TxnRequest{Compare: one, Success: puts(n, "/t/a"), Failure: puts(n, "/t/b")})
			// The proxy's own compares count in the root transaction: close to the limit, it
			// refuses a transaction that etcd would accept.
			if n != 126 && n != 127 {
				p.do(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestTxn{
					RequestTxn: &pb.TxnRequest{Compare: many, Success: puts(1, "/t/c"), Failure: puts(n, "/t/d")},
				}}}})
			}
		}
	}
	p.do(ctx, &pb.TxnRequest{Compare: []*pb.Compare{compare("/s/", "/s0", pb.Compare_EQUAL)}, Success: puts(2, "/t/e")})
	// A put with both ignore_value and a value, and a transaction with too many compares to read.
	keep := &pb.PutRequest{Key: []byte("/s/0"), Value: value, IgnoreValue: true}
	keepOp := &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: keep}}
	p.do(ctx, keep)
	p.do(ctx, &pb.PutRequest{Value: value, IgnoreValue: true})
	p.do(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{keepOp}})
	p.do(ctx, &pb.TxnRequest{Success: append(puts(1, ""), keepOp), Failure: puts(200, "/t/f")})
	p.do(ctx, &pb.TxnRequest{Compare: []*pb.Compare{compare("/s/0", "", pb.Compare_EQUAL)}, Failure: []*pb.RequestOp{keepOp}})
	var nested []*pb.RequestOp
	for i := range 20_000 {
		txn := &pb.TxnRequest{Compare: []*pb.Compare{compare(fmt.Sprintf("/s/%d", i), "", pb.Compare_EQUAL)}}
		nested = append(nested, &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: txn}})
	}
	p.do(ctx, &pb.TxnRequest{Success: nested})
	p.reset(ctx)
}

// sizes checks limits: etcd limits the encoded request, and gRPC the message. Through the proxy,
// both limits must apply to what the client sends.
func (b *bench) sizes(t *testing.T) {
	if b.proxy == nil {
		t.Skip("the etcd behind the proxy has a higher limit")
	}
	ctx := t.Context()
	p := b.pair(t)
	marker := b.env.Sealed.Value("")
	for _, limit := range []int{requestLimit, requestLimit + 512<<10} {
		for _, offset := range []int{-1000, -60, -30, -20, -16, -15, -14, -13, -12, -11, -10, -9, -8, -4, -1, 0, 1, 2, 8, 1000} {
			value := marker + strings.Repeat("v", limit+offset-len(marker))
			p.do(ctx, &pb.PutRequest{Key: []byte("/s/big"), Value: []byte(value)})
			if offset == -16 || offset == 0 {
				p.do(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{
					{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("/s/big1"), Value: []byte(value[:limit/2])}}},
					{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("/s/big2"), Value: []byte(marker + value[:limit/2+offset-len(marker)])}}},
				}})
			}
		}
	}
	p.do(ctx, &pb.RangeRequest{Key: []byte("/s/big"), RangeEnd: []byte("/s/bih")})
	p.reset(ctx)
}

func (b *bench) fragments(t *testing.T) {
	ctx := t.Context()
	p := b.pair(t)
	// Two events of 1 MiB are just too long for one fragment of a bare etcd, but not for one of the
	// etcd behind the proxy.
	for _, size := range []int{300 << 10, 1 << 20} {
		p.reset(ctx)
		from := p.revision + 1
		for i := range 12 {
			p.do(ctx, &pb.PutRequest{Key: []byte("/s/fragment"), Value: []byte(b.env.Sealed.Value(strings.Repeat("f", size+i)))})
		}
		for _, fragment := range []bool{false, true} {
			w := p.openWatch(ctx)
			// another watch, without fragments
			w.create(&pb.WatchCreateRequest{Key: []byte("/u/"), RangeEnd: []byte("/u0")})
			w.create(&pb.WatchCreateRequest{Key: []byte("/s/"), RangeEnd: []byte("/s0"), StartRevision: from, PrevKv: size < 1<<20, Fragment: fragment})
			w.check(ctx)
			if n := len(w.proxy.seen.events[1]); n != 12 {
				t.Errorf("fragment %t: %d events, want 12", fragment, n)
			}
			w.both("fragments", func(side *watcher) error {
				if largest := side.seen.largest; fragment && largest >= requestLimit+512<<10 {
					return fmt.Errorf("a fragment of %d bytes", largest)
				}
				return nil
			})
			w.close()
		}
	}
}

func (b *bench) longList(t *testing.T) {
	ctx := t.Context()
	p := b.pair(t)
	p.reset(ctx)
	n := 100_000
	if testing.Short() {
		n = 20_000
	}
	for i := 0; i < n; {
		txn := &pb.TxnRequest{}
		for ; i < n && len(txn.Success) < 128; i++ {
			txn.Success = append(txn.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{
				Key: fmt.Appendf(nil, "/s/list/%06d", i), Value: []byte(b.env.Sealed.Value(fmt.Sprintf("%d %s", i, strings.Repeat("l", 100))))}}})
		}
		p.do(ctx, txn)
	}
	p.trace = nil
	list := &pb.RangeRequest{Key: []byte("/s/list/"), RangeEnd: []byte("/s/list0")}
	for _, request := range []any{list, stream{list}, stream{&pb.RangeRequest{Key: list.Key, RangeEnd: list.RangeEnd, Limit: 1234}}} {
		a := p.do(ctx, request)
		if response, ok := a.message.(*pb.RangeResponse); !ok || response.Count != int64(n) {
			t.Errorf("a list of %d keys: %.200v", n, a)
		}
	}
	p.reset(ctx)
}

// halfClose checks that a watch continues to send after the client has half-closed the stream.
func (b *bench) halfClose(t *testing.T) {
	ctx := t.Context()
	p := b.pair(t)
	p.reset(ctx)
	w := p.openWatch(ctx)
	w.create(&pb.WatchCreateRequest{Key: []byte("/s/"), RangeEnd: []byte("/s0")})
	w.both("half-close", func(side *watcher) error { return side.stream.CloseSend() })
	ended := func(s *watched) bool { return s.err != nil }
	// What a server does after that is undefined, but it must be the same.
	results := []error{w.bare.until(300*time.Millisecond, ended), w.proxy.until(300*time.Millisecond, ended)}
	if (results[0] == nil) != (results[1] == nil) {
		t.Fatalf("after a half-close the stream ends on bare etcd: %t (%v), through the proxy: %t (%v)",
			results[0] == nil, w.bare.seen.err, results[1] == nil, w.proxy.seen.err)
	}
	if results[0] == nil {
		if a, b := status.Convert(w.bare.seen.err), status.Convert(w.proxy.seen.err); errors.Is(w.bare.seen.err, io.EOF) != errors.Is(w.proxy.seen.err, io.EOF) || a.Code() != b.Code() {
			t.Errorf("after a half-close: bare etcd %v, the proxy %v", w.bare.seen.err, w.proxy.seen.err)
		}
		return
	}
	p.do(ctx, &pb.PutRequest{Key: []byte("/s/a"), Value: []byte(b.env.Sealed.Value("after half-close"))})
	w.both("an event after the half-close", func(side *watcher) error {
		return side.until(10*time.Second, func(s *watched) bool { return len(s.events[0]) == 1 })
	})
	if difference, withoutPrevious := w.bare.seen.differs(&w.proxy.seen); difference != "" || withoutPrevious > 0 {
		t.Errorf("%s; %d watches lack previous values", difference, withoutPrevious)
	}
}

func (b *bench) expiry(t *testing.T) {
	ctx := t.Context()
	p := b.pair(t)
	p.reset(ctx)
	w := p.openWatch(ctx)
	w.create(&pb.WatchCreateRequest{Key: []byte("/s/"), RangeEnd: []byte("/s0"), PrevKv: true})
	p.do(ctx, &pb.LeaseGrantRequest{ID: 77, TTL: 1})
	p.do(ctx, &pb.PutRequest{Key: []byte("/s/leased"), Value: []byte(b.env.Sealed.Value("leased")), Lease: 77})
	w.both("the key expires", func(side *watcher) error {
		return side.until(30*time.Second, func(s *watched) bool { return len(s.events[0]) == 2 })
	})
	if difference, withoutPrevious := w.bare.seen.differs(&w.proxy.seen); difference != "" || withoutPrevious > 0 {
		t.Errorf("%s; %d watches lack previous values", difference, withoutPrevious)
	}
	p.do(ctx, &pb.LeaseTimeToLiveRequest{ID: 77, Keys: true})
	p.do(ctx, &pb.RangeRequest{Key: []byte("/s/leased")})
}

func (b *bench) deadlines(t *testing.T) {
	for _, side := range []*side{b.bare, b.via} {
		expired, cancel := context.WithDeadline(t.Context(), time.Now().Add(-time.Second))
		_, err := side.kv.Put(expired, &pb.PutRequest{Key: []byte("/s/late"), Value: []byte("x")})
		cancel()
		if status.Code(err) != codes.DeadlineExceeded {
			t.Errorf("%s, a deadline in the past: %v", side.name, err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		w, err := side.openWatch(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.create(&pb.WatchCreateRequest{Key: []byte("/s/")}); err != nil {
			t.Fatal(err)
		}
		cancel()
		<-w.done
		if status.Code(w.seen.err) != codes.Canceled {
			t.Errorf("%s, a canceled watch: %v", side.name, w.seen.err)
		}
		w.close()
	}
}

// rawCodec sends bytes unchanged, under the name that etcd knows.
type rawCodec struct{}

func (rawCodec) Name() string { return "proto" }

func (rawCodec) Marshal(v any) (mem.BufferSlice, error) {
	return mem.BufferSlice{mem.SliceBuffer(*v.(*[]byte))}, nil
}

func (rawCodec) Unmarshal(data mem.BufferSlice, v any) error {
	*v.(*[]byte) = data.Materialize()
	return nil
}

var _ encoding.CodecV2 = rawCodec{}

func (b *bench) malformed(t *testing.T) {
	if b.proxy == nil {
		t.Skip("etcd itself is less strict")
	}
	conn := harness.Dial(t, b.proxy.Address, nil)
	sealed := b.env.Sealed.Value("smuggled")
	field := func(number int, data string) string {
		return string([]byte{byte(number<<3 | 2), byte(len(data))}) + data
	}
	// Txn.success[0].request_put
	put := func(parts ...string) string { return field(1, field(2, strings.Join(parts, ""))) }
	for name, test := range map[string]struct{ method, message string }{
		"not protobuf":                    {"Put", "\xff\xff\xff"},
		"truncated":                       {"Put", field(1, "/s/a")[:3]},
		"two keys in a put":               {"Put", field(1, "/u/1") + field(1, "/s/a") + field(2, sealed)},
		"two values in a put":             {"Put", field(1, "/s/a") + field(2, sealed) + field(2, sealed)},
		"two keys in a put in a txn":      {"Txn", field(2, field(2, field(1, "/u/1")+field(1, "/s/a")+field(2, sealed)))},
		"two puts in one op":              {"Txn", field(2, field(2, field(1, "/u/1")+field(2, sealed))+field(2, field(1, "/s/a")+field(2, sealed)))},
		"two arms of a oneof":             {"Txn", field(2, field(1, field(1, "/u/1"))+field(2, field(1, "/s/a")+field(2, sealed)))},
		"a put whose key is cut":          {"Txn", field(2, put(field(1, "/s/a"))[:5])},
		"nested deeper than any client's": {"Txn", nest(1500)},
	} {
		request, response := []byte(test.message), []byte(nil)
		err := conn.Invoke(t.Context(), "/etcdserverpb.KV/"+test.method, &request, &response, grpc.ForceCodecV2(rawCodec{}))
		if status.Code(err) != codes.InvalidArgument && status.Code(err) != codes.Unimplemented {
			t.Errorf("%s: %v, want InvalidArgument", name, err)
		}
	}
	request, response := []byte(nil), []byte(nil)
	err := conn.Invoke(t.Context(), "/etcdserverpb.KV/PutLater", &request, &response, grpc.ForceCodecV2(rawCodec{}))
	if status.Code(err) != codes.Unimplemented {
		t.Errorf("an unknown method: %v, want Unimplemented", err)
	}
}

// nest returns a Txn with n nested transactions.
func nest(n int) string {
	message := ""
	for range n {
		op := "\x22" + varint(len(message)) + message // request_txn
		message = "\x12" + varint(len(op)) + op       // success
	}
	return message
}

func varint(n int) string {
	if n < 0x80 {
		return string([]byte{byte(n)})
	}
	return string([]byte{byte(n) | 0x80, byte(n >> 7)})
}

// injected checks that somebody who can write to etcd cannot make the proxy return the written
// plaintext under a strict rule, nor move a ciphertext to another key.
func (b *bench) injected(t *testing.T) {
	if b.proxy == nil {
		t.Skip("nothing to inject into")
	}
	ctx := t.Context()
	b.via.do(ctx, &pb.PutRequest{Key: []byte("/t/honest"), Value: []byte(b.env.Sealed.Value("honest"))})
	stored := b.raw.do(ctx, &pb.RangeRequest{Key: []byte("/t/honest")}).message.(*pb.RangeResponse).Kvs[0].Value
	flip := func(at int) []byte {
		tampered := bytes.Clone(stored)
		tampered[(at+len(tampered))%len(tampered)] ^= 1
		return tampered
	}
	for name, value := range map[string][]byte{
		"plaintext": []byte("injected"), "empty": {}, "another provider's": []byte("k8s:enc:kms:v2:other:\nx"),
		"moved": stored, "tampered at the end": flip(-1), "tampered in the middle": flip(len(stored) / 2), "cut": stored[:len(stored)-1],
	} {
		key := "/t/injected"
		b.raw.do(ctx, &pb.PutRequest{Key: []byte(key), Value: value})
		a := b.via.do(ctx, &pb.RangeRequest{Key: []byte("/t/"), RangeEnd: []byte("/t0")})
		if a.err.Code() != codes.DataLoss || !strings.Contains(a.err.Message(), key) {
			t.Errorf("%s value: %v, want DataLoss that names %s", name, a, key)
		}
		for what, request := range map[string]any{
			"keys only": &pb.RangeRequest{Key: []byte(key), KeysOnly: true}, "count only": &pb.RangeRequest{Key: []byte(key), CountOnly: true},
			"its neighbour": &pb.RangeRequest{Key: []byte("/t/honest")},
		} {
			if a := b.via.do(ctx, request); a.err != nil {
				t.Errorf("%s value, %s: %v", name, what, a)
			}
		}
		b.raw.do(ctx, &pb.DeleteRangeRequest{Key: []byte(key)})
	}
	// A rule that is not strict returns plaintext, for data from before encryption.
	b.raw.do(ctx, &pb.PutRequest{Key: []byte("/s/old"), Value: []byte("from before")})
	if a := b.via.do(ctx, &pb.RangeRequest{Key: []byte("/s/old")}); a.err != nil || string(a.message.(*pb.RangeResponse).Kvs[0].Value) != "from before" {
		t.Errorf("plaintext under a lenient rule: %v", a)
	}
	b.raw.do(ctx, &pb.DeleteRangeRequest{Key: []byte("/s/old")})
	b.raw.do(ctx, &pb.DeleteRangeRequest{Key: []byte("/t/honest")})
}
