package etcdwire

import (
	"bytes"
	"errors"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
)

// TestAgreesWithModel holds every rewriter against decode, edit, encode.
func TestAgreesWithModel(t *testing.T) {
	for _, m := range methods {
		t.Run(m.name, func(t *testing.T) {
			for i, sample := range samples()[m.name] {
				for _, prefix := range []string{"s/", "nothing/"} {
					msg := wire(t, sample)
					rules := brackets{prefix}
					got, err := m.rewrite(msg, rules)
					if err != nil {
						t.Fatalf("sample %d, rule %q: %v", i, prefix, err)
					}
					want := proto.Clone(sample)
					if err := m.model(want, rules); err != nil {
						t.Fatal(err)
					}
					if !bytes.Equal(got, wire(t, want)) {
						t.Errorf("sample %d, rule %q:\n got %v\nwant %v", i, prefix, decode(t, got, m.message()), want)
					}
					if prefix == "nothing/" && !m.answer && !same(got, msg) {
						t.Errorf("sample %d: a message without a change was copied", i)
					}
				}
			}
		})
	}
}

// TestUnknownFieldsStay puts fields that no etcd has into every level of a message.
func TestUnknownFieldsStay(t *testing.T) {
	unknown := protowire.AppendVarint(protowire.AppendTag(nil, 90, protowire.VarintType), 1<<40)
	unknown = protowire.AppendBytes(protowire.AppendTag(unknown, 91, protowire.BytesType), []byte("future"))
	inKV := append(wire(t, kv("s/a", "[s/a|one]")), unknown...)
	msg := protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), inKV)
	msg = append(msg, unknown...)
	got, err := RangeResponse(nil, msg, brackets{"s/"}, RangeShape{})
	if err != nil {
		t.Fatal(err)
	}
	wantKV := append(wire(t, kv("s/a", "one")), unknown...)
	want := append(protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), wantKV), unknown...)
	if !bytes.Equal(got, want) {
		t.Errorf("got %x\nwant %x", got, want)
	}
}

// TestKeyAfterValue rewrites messages whose fields stand in the reverse of the usual order.
func TestKeyAfterValue(t *testing.T) {
	msg := protowire.AppendBytes(protowire.AppendTag(nil, 2, protowire.BytesType), []byte("v"))
	msg = protowire.AppendBytes(protowire.AppendTag(msg, 1, protowire.BytesType), []byte("s/a"))
	got, err := PutRequest(nil, msg, brackets{"s/"})
	if err != nil {
		t.Fatal(err)
	}
	if v := decode(t, got, new(pb.PutRequest)).Value; string(v) != "[s/a|v]" {
		t.Errorf("value is %q", v)
	}
}

// TestLongLengths crosses the sizes at which length prefixes grow, at every level of nesting.
func TestLongLengths(t *testing.T) {
	for _, n := range []int{0, 1, 100, 110, 117, 118, 119, 120, 127, 128, 16200, 16370, 16383, 16384, 1 << 21} {
		value := strings.Repeat("v", n)
		req := &pb.TxnRequest{Success: []*pb.RequestOp{nested(&pb.TxnRequest{Failure: []*pb.RequestOp{put("s/a", value)}})}}
		got, _, err := TxnRequest(nil, wire(t, req), brackets{"s/"})
		if err != nil {
			t.Fatal(err)
		}
		deep := decode(t, got, new(pb.TxnRequest)).Success[0].GetRequestTxn().Failure[0].GetRequestPut()
		if string(deep.Value) != "[s/a|"+value+"]" || deep.Lease != 9 || !deep.PrevKv {
			t.Errorf("size %d: wrong put after rewriting", n)
		}
		res := &pb.RangeStreamResponse{RangeResponse: &pb.RangeResponse{
			Kvs: []*mvccpb.KeyValue{kv("s/a", "[s/a|"+value+"]"), kv("s/b", "[s/b|"+value+"]"), kv("p/c", value)}, Count: 3,
		}}
		msg := wire(t, res)
		dst := make([]byte, 3, 3+len(msg)) // room for as much as there is
		got, err = RangeStreamResponse(dst, msg, brackets{"s/"}, RangeShape{})
		if err != nil {
			t.Fatal(err)
		}
		res.RangeResponse.Kvs[0].Value, res.RangeResponse.Kvs[1].Value = []byte(value), []byte(value)
		if have := decode(t, got[3:], new(pb.RangeStreamResponse)); !proto.Equal(have, res) {
			t.Errorf("size %d: wrong answer after opening", n)
		}
		if &got[0] != &dst[0] {
			t.Errorf("size %d: the room was not enough", n)
		}
	}
}

// TestKeysOnly leaves values that were never requested alone, and hands truly empty ones to Open.
func TestKeysOnly(t *testing.T) {
	bare := &mvccpb.KeyValue{Key: []byte("s/a"), ModRevision: 4, Version: 1}
	msg := wire(t, &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{bare}})
	if _, err := RangeResponse(nil, msg, brackets{"s/"}, RangeShape{}); !errors.Is(err, errOpen) {
		t.Errorf("an empty stored value was not opened: %v", err)
	}
	if got, err := RangeResponse(nil, msg, brackets{"s/"}, RangeShape{KeysOnly: true}); err != nil || !bytes.Equal(got, msg) {
		t.Errorf("keys_only: %v", err)
	}

	tombstone := wire(t, &pb.DeleteRangeResponse{PrevKvs: []*mvccpb.KeyValue{{Key: []byte("s/a"), ModRevision: 4}}})
	if got, err := DeleteRangeResponse(nil, tombstone, brackets{"s/"}); err != nil || !bytes.Equal(got, tombstone) {
		t.Errorf("a tombstone: %v", err)
	}

	keys := rng(&pb.RangeRequest{Key: []byte("s/a"), KeysOnly: true})
	values := rng(&pb.RangeRequest{Key: []byte("s/a")})
	req := wire(t, &pb.TxnRequest{
		Success: []*pb.RequestOp{values, keys, nested(&pb.TxnRequest{Failure: []*pb.RequestOp{keys}})},
		Failure: []*pb.RequestOp{values},
	})
	_, shape, err := TxnRequest(nil, req, brackets{"s/"})
	if err != nil {
		t.Fatal(err)
	}
	inner := &pb.ResponseOp{Response: &pb.ResponseOp_ResponseTxn{ResponseTxn: answers(false, ranged(bare))}}
	full := ranged(kv("s/a", "[s/a|one]"))
	for _, c := range []struct {
		name string
		res  *pb.TxnResponse
		want error
	}{
		{"each as asked", answers(true, full, ranged(bare), inner), nil},
		{"no value where one was asked for", answers(true, ranged(bare), ranged(bare), inner), errOpen},
		{"the other branch", answers(false, ranged(bare)), errOpen},
	} {
		if _, err := TxnResponse(nil, wire(t, c.res), brackets{"s/"}, shape); !errors.Is(err, c.want) {
			t.Errorf("%s: got %v, want %v", c.name, err, c.want)
		}
	}
}

func BenchmarkPutRequest(b *testing.B) {
	msg := wire(b, &pb.PutRequest{Key: []byte("s/a"), Value: make([]byte, 256)})
	b.ReportAllocs()
	for b.Loop() {
		if _, err := PutRequest(nil, msg, brackets{"s/"}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkWatchResponse(b *testing.B) {
	msg := wire(b, &pb.WatchResponse{Header: &pb.ResponseHeader{Revision: 5}, Events: []*mvccpb.Event{{Kv: kv("s/a", "[s/a|"+strings.Repeat("v", 1024)+"]")}}})
	dst := make([]byte, 0, len(msg))
	b.ReportAllocs()
	for b.Loop() {
		if _, err := WatchResponse(dst, msg, brackets{"s/"}); err != nil {
			b.Fatal(err)
		}
	}
}

func BenchmarkRangeResponse(b *testing.B) {
	res := new(pb.RangeResponse)
	for range 64 { // about as many as the proxy rewrites at once
		res.Kvs = append(res.Kvs, kv("s/a", "[s/a|"+strings.Repeat("v", 1024)+"]"))
	}
	for name, rules := range map[string]Rules{"open": brackets{"s/"}, "pass": new(untouched)} {
		b.Run(name+"/64x1KiB", func(b *testing.B) {
			msg := wire(b, res)
			b.SetBytes(int64(len(msg)))
			b.ReportAllocs()
			dst := make([]byte, 0, len(msg))
			for b.Loop() {
				if _, err := RangeResponse(dst, msg, rules, RangeShape{}); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}

// TestTypeAfterPair: the type of an event counts wherever it stands.
func TestTypeAfterPair(t *testing.T) {
	present := wire(t, kv("s/a", "[s/a|one]"))
	absent := wire(t, &mvccpb.KeyValue{Key: []byte("s/a"), ModRevision: 4, Version: 1})
	number := func(b []byte, n protowire.Number, v uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
	}
	field := func(b []byte, n protowire.Number, v []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), v)
	}
	for name, tt := range map[string]struct {
		event []byte
		want  error // [errOpen] where an absent value is read as an empty one
	}{
		"put":                     {field(nil, 2, absent), errOpen},
		"put, type after pair":    {number(field(nil, 2, absent), 1, 0), errOpen},
		"delete":                  {field(number(nil, 1, 1), 2, absent), nil},
		"delete, type after pair": {number(field(nil, 2, absent), 1, 1), nil},
		"delete, pair in the middle, previous pair": {number(field(field(nil, 3, present), 2, absent), 1, 1), nil},
		"delete, absent previous value":             {number(field(nil, 3, absent), 1, 1), errOpen},
		"put with a value, type after pair":         {number(field(nil, 2, present), 1, 0), nil},
	} {
		msg := field(nil, 11, tt.event)
		got, err := WatchResponse(nil, msg, brackets{"s/"})
		if !errors.Is(err, tt.want) {
			t.Errorf("%s: %v, want %v", name, err, tt.want)
		}
		if err == nil && bytes.Contains(msg, []byte("[s/a|one]")) != bytes.Contains(got, []byte("one")) || bytes.Contains(got, []byte("[s/a|one]")) {
			t.Errorf("%s: got %q", name, got)
		}
	}
}
