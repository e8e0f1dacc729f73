package etcdwire

import (
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
)

// schema is what the rewriter relies on in one message type of etcdserverpb. Field n is bit n-1;
// fields above 64 are unknown to it.
//
// Decoders disagree about messages that say one thing twice: the last scalar wins, submessages are
// merged, of two arms of a oneof one is dropped. A client could use that to show the proxy one key
// and the server another, so such a message is refused.
type schema struct {
	name   string
	bytes  uint64 // length-delimited fields
	varint uint64
	once   uint64 // fields that are not repeated
	arms   uint64 // the fields of a oneof: at most one of them may be present
}

func bits(fields ...int) uint64 {
	var b uint64
	for _, f := range fields {
		b |= 1 << (f - 1)
	}
	return b
}

// The message types, from etcd's rpc.proto and kv.proto (api/v3, 3.4 to 3.7).
var (
	putRequest     = schema{name: "PutRequest", bytes: bits(1, 2), varint: bits(3, 4, 5, 6), once: bits(1, 2, 3, 4, 5, 6)}
	rangeRequest   = schema{name: "RangeRequest", bytes: bits(1, 2), varint: bits(3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13), once: bits(1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13)}
	deleteRequest  = schema{name: "DeleteRangeRequest", bytes: bits(1, 2), varint: bits(3), once: bits(1, 2, 3)}
	compare        = schema{name: "Compare", bytes: bits(3, 7, 64), varint: bits(1, 2, 4, 5, 6, 8), once: bits(1, 2, 3, 4, 5, 6, 7, 8, 64), arms: bits(4, 5, 6, 7, 8)}
	requestOp      = schema{name: "RequestOp", bytes: bits(1, 2, 3, 4), once: bits(1, 2, 3, 4), arms: bits(1, 2, 3, 4)}
	txnRequest     = schema{name: "TxnRequest", bytes: bits(1, 2, 3)}
	keyValue       = schema{name: "KeyValue", bytes: bits(1, 5), varint: bits(2, 3, 4, 6), once: bits(1, 2, 3, 4, 5, 6)}
	putResponse    = schema{name: "PutResponse", bytes: bits(1, 2), once: bits(1, 2)}
	rangeResponse  = schema{name: "RangeResponse", bytes: bits(1, 2), varint: bits(3, 4), once: bits(1, 3, 4)}
	streamResponse = schema{name: "RangeStreamResponse", bytes: bits(1), once: bits(1)}
	deleteResponse = schema{name: "DeleteRangeResponse", bytes: bits(1, 3), varint: bits(2), once: bits(1, 2)}
	responseOp     = schema{name: "ResponseOp", bytes: bits(1, 2, 3, 4), once: bits(1, 2, 3, 4), arms: bits(1, 2, 3, 4)}
	txnResponse    = schema{name: "TxnResponse", bytes: bits(1, 3), varint: bits(2), once: bits(1, 2)}

	// In the two that follow a field may occur twice: nothing in them is encrypted.

	watchRequest       = schema{name: "WatchRequest", bytes: bits(1, 2, 3)}
	watchCreateRequest = schema{name: "WatchCreateRequest", bytes: bits(1, 2), varint: bits(3, 4, 6, 7, 8)}
	watchResponse      = schema{name: "WatchResponse", bytes: bits(1, 6, 11), varint: bits(2, 3, 4, 5, 7), once: bits(1, 2, 3, 4, 5, 6, 7)}
	event              = schema{name: "Event", bytes: bits(2, 3), varint: bits(1), once: bits(1, 2, 3)}
	named              = schema{name: "request", bytes: bits(1), once: bits(1)}
	alarmRequest       = schema{name: "AlarmRequest", varint: bits(1, 2, 3), once: bits(1, 2, 3)}
	leaseRequest       = schema{name: "LeaseRevokeRequest", varint: bits(1), once: bits(1)}
	leaderKey          = schema{name: "LeaderKey", bytes: bits(1, 2), varint: bits(3, 4), once: bits(1, 2, 3, 4)}
)

func (s *schema) malformed(what string, num protowire.Number) error {
	return fmt.Errorf("%w: %s: field %d %s", ErrMalformed, s.name, num, what)
}

// field is one field of a message, as offsets into the whole message: tag at [start, val), a length
// prefix at [val, body) where there is one, the contents at [body, end).
type field struct {
	num                   protowire.Number
	start, val, body, end int
	n                     uint64 // the value of a varint
}

// int32 is the field's value as an enum. Decoders cut longer varints down to 32 bits, so this must
// too.
func (f field) int32() int32 { return int32(f.n) } //nolint:gosec // the cut is what the wire format demands

// scanner walks over the fields of one message.
type scanner struct {
	schema  *schema
	src     []byte
	at, end int
	seen    uint64
	field   field
	err     error
}

func scan(s *schema, src []byte, at, end int) scanner {
	return scanner{schema: s, src: src, at: at, end: end}
}

// next moves to the next field. It returns false at the end and at the first fault, which err then
// holds.
func (s *scanner) next() bool {
	if s.at >= s.end || s.err != nil {
		return false
	}
	b := s.src[:s.end]
	num, typ, n := protowire.Number(b[s.at]>>3), protowire.Type(b[s.at]&7), 1
	if b[s.at] >= 0x80 || num == 0 { // a longer tag, or none
		if num, typ, n = protowire.ConsumeTag(b[s.at:]); n < 0 {
			s.err = fmt.Errorf("%w: %s: invalid or truncated tag", ErrMalformed, s.schema.name)
			return false
		}
	}
	f := &s.field
	*f = field{num: num, start: s.at, val: s.at + n}
	switch typ {
	case protowire.BytesType:
		length, n := varint(b[f.val:])
		if n < 0 || length > uint64(s.end-f.val-n) { //nolint:gosec // n bytes were read from within the message
			s.err = s.schema.malformed("is truncated", num)
			return false
		}
		f.body = f.val + n
		f.end = f.body + int(length) //nolint:gosec // bounded by the line above
	case protowire.VarintType:
		v, n := varint(b[f.val:])
		if n < 0 {
			s.err = s.schema.malformed("is truncated", num)
			return false
		}
		f.n, f.body, f.end = v, f.val, f.val+n
	case protowire.Fixed32Type, protowire.Fixed64Type:
		n := protowire.ConsumeFieldValue(num, typ, b[f.val:])
		if n < 0 {
			s.err = s.schema.malformed("is truncated", num)
			return false
		}
		f.body, f.end = f.val, f.val+n
	default:
		// Groups nest without a length and no etcd message has ever had one.
		s.err = s.schema.malformed("is a group", num)
		return false
	}
	if num <= 64 {
		bit := uint64(1) << (num - 1)
		switch {
		case s.schema.bytes&bit != 0 && typ != protowire.BytesType, s.schema.varint&bit != 0 && typ != protowire.VarintType:
			s.err = s.schema.malformed("has the wrong wire type", num)
		case s.schema.once&bit != 0 && s.seen&bit != 0:
			s.err = s.schema.malformed("occurs twice", num)
		case s.schema.arms&bit != 0 && s.seen&s.schema.arms != 0:
			s.err = s.schema.malformed("is a second arm of a oneof", num)
		}
		if s.err != nil {
			return false
		}
		s.seen |= bit
	}
	s.at = f.end
	return true
}

// varint is protowire.ConsumeVarint, with a number of one byte read in place.
func varint(b []byte) (uint64, int) {
	if len(b) > 0 && b[0] < 0x80 {
		return uint64(b[0]), 1
	}
	return protowire.ConsumeVarint(b)
}

// body returns the contents of a length-delimited field.
func (s *scanner) body() []byte { return s.src[s.field.body:s.field.end:s.field.end] }
