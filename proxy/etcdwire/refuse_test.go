package etcdwire

import (
	"errors"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/encoding/protowire"
)

func bytesField(num protowire.Number, v string) []byte {
	return protowire.AppendBytes(protowire.AppendTag(nil, num, protowire.BytesType), []byte(v))
}

func join(parts ...[]byte) (all []byte) {
	for _, p := range parts {
		all = append(all, p...)
	}
	return all
}

// TestAmbiguous refuses messages that two decoders could read in two ways.
func TestAmbiguous(t *testing.T) {
	key, other, val := bytesField(1, "p/a"), bytesField(1, "s/a"), bytesField(2, "v")
	onePut := string(join(key, val))
	txn := func(op []byte) []byte { return bytesField(2, string(op)) }
	flag := func(num protowire.Number, v uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(nil, num, protowire.VarintType), v)
	}
	group := protowire.AppendTag(protowire.AppendTag(nil, 90, protowire.StartGroupType), 90, protowire.EndGroupType)
	deep := []byte{}
	for range maxTxnDepth + 1 {
		deep = txn(bytesField(4, string(deep)))
	}
	// A field number of 2^32+1 is field 1 to a decoder that cuts it to 32 bits.
	hugeTag := append(protowire.AppendVarint(nil, (1<<32+1)<<3|2), 1, 'x')
	type request func([]byte) error
	putReq := func(b []byte) error { _, err := PutRequest(nil, b, brackets{"s/"}); return err }
	txnReq := func(b []byte) error { _, _, err := TxnRequest(nil, b, brackets{"s/"}); return err }
	rngReq := func(b []byte) error { _, _, err := RangeRequest(b, brackets{"s/"}); return err }
	for name, c := range map[string]struct {
		send request
		msg  []byte
	}{
		"two keys":                 {putReq, join(key, val, other)},
		"two values":               {putReq, join(key, val, val)},
		"ignore_value twice":       {putReq, join(key, flag(5, 1), val, flag(5, 0))},
		"key as varint":            {putReq, join(flag(1, 3), val)},
		"ignore_value as bytes":    {putReq, join(key, bytesField(5, "\x01"))},
		"group":                    {putReq, join(key, group, val)},
		"tag beyond 32 bits":       {putReq, join(key, val, hugeTag)},
		"field number 0":           {putReq, join(key, []byte{2, 0})},
		"two arms":                 {txnReq, txn(join(bytesField(2, onePut), bytesField(1, string(other))))},
		"the same arm twice":       {txnReq, txn(join(bytesField(2, onePut), bytesField(2, string(other))))},
		"two keys in a put":        {txnReq, txn(bytesField(2, string(join(key, other, val))))},
		"nesting bomb":             {txnReq, deep},
		"two targets":              {txnReq, bytesField(1, string(join(flag(2, 0), flag(2, 3), bytesField(3, "s/a"))))},
		"two operands":             {txnReq, bytesField(1, string(join(flag(4, 1), bytesField(7, "v"), bytesField(3, "s/a"))))},
		"two keys in a range":      {rngReq, join(key, other)},
		"two sort targets":         {rngReq, join(other, flag(6, 0), flag(6, 4))},
		"two keys in a delete":     {func(b []byte) error { _, _, err := DeleteRangeRequest(b); return err }, join(key, other)},
		"length beyond the end":    {putReq, []byte{1<<3 | 2, 9, 'a'}},
		"endless varint":           {putReq, []byte{3 << 3, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 1}},
		"two names of an election": {func(b []byte) error { _, err := Name(b); return err }, join(key, other)},
		"two leaders":              {func(b []byte) error { _, err := LeaderKey(b); return err }, join(bytesField(1, "\x12\x01a"), bytesField(1, "\x12\x01b"))},
	} {
		if err := c.send(c.msg); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: got %v, want ErrMalformed", name, err)
		}
	}
	if err := txnReq(txn(bytesField(9, "future"))); !errors.Is(err, ErrUnsupported) {
		t.Errorf("an unknown operation: got %v, want ErrUnsupported", err)
	}
}

// TestByValue refuses compares and sorts by value where a rule is met, and only there.
func TestByValue(t *testing.T) {
	cmp := func(target pb.Compare_CompareTarget, key, end string, value bool) []byte {
		c := &pb.Compare{Target: target, Key: []byte(key), RangeEnd: []byte(end)}
		if value {
			c.TargetUnion = &pb.Compare_Value{Value: []byte("operand")}
		}
		return wire(t, &pb.TxnRequest{Success: []*pb.RequestOp{nested(&pb.TxnRequest{Compare: []*pb.Compare{c}})}})
	}
	// An enum is cut to 32 bits by every decoder: this is VALUE too.
	disguised := bytesField(1, string(join(protowire.AppendVarint(protowire.AppendTag(nil, 2, protowire.VarintType), 1<<32|3), bytesField(3, "s/a"))))
	for name, c := range map[string]struct {
		msg  []byte
		want error
	}{
		"key under a rule":                 {cmp(pb.Compare_VALUE, "s/a", "", true), ErrByValue},
		"range over a rule":                {cmp(pb.Compare_VALUE, "a", "z", true), ErrByValue},
		"range that ends before it begins": {cmp(pb.Compare_VALUE, "s/b", "s/a", true), ErrByValue},
		"absent operand":                   {cmp(pb.Compare_VALUE, "s/a", "", false), ErrByValue},
		"operand of an ignored target":     {cmp(pb.Compare_VERSION, "s/a", "", true), ErrByValue},
		"disguised target":                 {disguised, ErrByValue},
		"key under no rule":                {cmp(pb.Compare_VALUE, "p/a", "", true), nil},
		"revision of a key under a rule":   {cmp(pb.Compare_MOD, "s/a", "", false), nil},
	} {
		if out, _, err := TxnRequest(nil, c.msg, brackets{"s/"}); !errors.Is(err, c.want) || (err == nil && !same(out, c.msg)) {
			t.Errorf("compare, %s: got %v, want %v", name, err, c.want)
		}
	}
	for name, c := range map[string]struct {
		req  *pb.RangeRequest
		want error
	}{
		"under a rule":           {&pb.RangeRequest{Key: []byte("s/"), RangeEnd: []byte("s0"), SortTarget: pb.RangeRequest_VALUE, SortOrder: pb.RangeRequest_ASCEND}, ErrByValue},
		"order none":             {&pb.RangeRequest{Key: []byte("s/a"), SortTarget: pb.RangeRequest_VALUE}, ErrByValue},
		"under no rule":          {&pb.RangeRequest{Key: []byte("p/"), RangeEnd: []byte("p0"), SortTarget: pb.RangeRequest_VALUE}, nil},
		"by key under a rule":    {&pb.RangeRequest{Key: []byte("s/"), RangeEnd: []byte("s0"), SortTarget: pb.RangeRequest_KEY}, nil},
		"every key from a start": {&pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte{0}, SortTarget: pb.RangeRequest_VALUE}, ErrByValue},
	} {
		if _, _, err := RangeRequest(wire(t, c.req), brackets{"s/"}); !errors.Is(err, c.want) {
			t.Errorf("sort %s: got %v, want %v", name, err, c.want)
		}
		in := wire(t, &pb.TxnRequest{Failure: []*pb.RequestOp{rng(c.req)}})
		if _, _, err := TxnRequest(nil, in, brackets{"s/"}); !errors.Is(err, c.want) {
			t.Errorf("sort %s, in a transaction: got %v, want %v", name, err, c.want)
		}
	}
}

// TestNames reads what a lock or an election is about.
func TestNames(t *testing.T) {
	if name, err := Name(bytesField(1, "lock")); err != nil || string(name) != "lock" {
		t.Errorf("got %q, %v", name, err)
	}
	if key, err := LeaderKey(bytesField(1, string(join(bytesField(1, "e"), bytesField(2, "e/1"))))); err != nil || string(key) != "e/1" {
		t.Errorf("got %q, %v", key, err)
	}
}

// TestDamage truncates and corrupts every byte of every sample: a clean error or a message that
// still agrees with the model.
func TestDamage(t *testing.T) {
	for _, m := range methods {
		for _, sample := range samples()[m.name] {
			msg := wire(t, sample)
			for i := range msg {
				check(t, m, msg[:i])
				for _, flip := range []byte{1, 0x80, 0xff} {
					bad := append([]byte{}, msg...)
					bad[i] ^= flip
					check(t, m, bad)
				}
			}
		}
	}
}
