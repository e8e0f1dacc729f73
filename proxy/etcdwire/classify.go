package etcdwire

import (
	"fmt"
	"math"

	"google.golang.org/protobuf/encoding/protowire"
)

// The functions in this file return the keys and properties of a request, and do not change it.
// Byte slices that they return alias the message. Errors wrap [ErrMalformed], also for a message
// that decoders could read in two ways.

// PutKey returns the key of a PutRequest.
func PutKey(msg []byte) ([]byte, error) { return lastBytesField(&putRequest, msg, 1) }

// DeleteRangeRequest returns the key and the range end of a DeleteRangeRequest.
func DeleteRangeRequest(msg []byte) (key, rangeEnd []byte, err error) {
	return keyRange(&deleteRequest, msg, 0, len(msg))
}

// keyRange returns the fields 1 and 2 of a message at [at, end) of src.
func keyRange(sc *schema, src []byte, at, end int) (key, rangeEnd []byte, err error) {
	s := scan(sc, src, at, end)
	for s.next() {
		switch s.field.num {
		case 1:
			key = s.body()
		case 2:
			rangeEnd = s.body()
		}
	}
	return key, rangeEnd, s.err
}

// Operations is told what the operations of a transaction are about.
type Operations interface {
	Range(key, rangeEnd []byte)
	Put(key []byte)
	Delete(key, rangeEnd []byte)
}

// EachOperation tells about the operations of a TxnRequest, in both branches and in nested
// transactions. It stops at the first error, which may also wrap [ErrUnsupported]: an operation is
// unknown.
func EachOperation(msg []byte, to Operations) error { return eachOperation(msg, 0, len(msg), 1, to) }

func eachOperation(src []byte, at, end, depth int, to Operations) error {
	if depth > maxTxnDepth {
		return errTooDeep
	}
	s := scan(&txnRequest, src, at, end)
	for s.next() {
		if s.field.num != 2 && s.field.num != 3 {
			continue
		}
		if err := operation(src, s.field, depth, to); err != nil {
			return err
		}
	}
	return s.err
}

func operation(src []byte, f field, depth int, to Operations) error {
	s := scan(&requestOp, src, f.body, f.end)
	for s.next() {
		var key, rangeEnd []byte
		var err error
		switch f := s.field; f.num {
		case 1:
			if key, rangeEnd, err = keyRange(&rangeRequest, src, f.body, f.end); err == nil {
				to.Range(key, rangeEnd)
			}
		case 2:
			if key, _, err = keyRange(&putRequest, src, f.body, f.end); err == nil {
				to.Put(key)
			}
		case 3:
			if key, rangeEnd, err = keyRange(&deleteRequest, src, f.body, f.end); err == nil {
				to.Delete(key, rangeEnd)
			}
		case 4:
			err = eachOperation(src, f.body, f.end, depth+1, to)
		default:
			err = unknownOperation(f)
		}
		if err != nil {
			return err
		}
	}
	return s.err
}

// unknownOperation is the error for an operation of a newer etcd: it could write a value that
// would not be encrypted.
func unknownOperation(f field) error {
	return fmt.Errorf("operation %d of a transaction is unknown: %w", f.num, ErrUnsupported)
}

var errTooDeep = fmt.Errorf("%w: transactions nested more than %d deep", ErrMalformed, maxTxnDepth)

// Watch is what a WatchRequest asks for.
type Watch struct {
	Creates   bool // it creates a watch
	Fragments bool // large responses to it may come in fragments
	Touches   bool // some watch that it may create can meet a key under a rule
}

// WatchRequest says what a WatchRequest asks for. Of a message that says one thing twice, the last
// counts, as for etcd; but what decoders may merge counts as touching a rule, and so does an empty
// key, which is the first that there can be.
func WatchRequest(msg []byte, rules Rules) (w Watch, err error) {
	creations := 0
	s := scan(&watchRequest, msg, 0, len(msg))
	for s.next() {
		switch s.field.num {
		case watchCreate:
			creations++
			touches, fragments, err := watchCreation(msg, s.field, rules)
			if err != nil {
				return Watch{}, err
			}
			w = Watch{Creates: true, Fragments: fragments, Touches: w.Touches || touches || creations > 1}
		case 2, 3: // another arm of the oneof
			w.Creates, w.Fragments = false, false
		}
	}
	return w, s.err
}

func watchCreation(msg []byte, f field, rules Rules) (touches, fragments bool, err error) {
	var key, rangeEnd []byte
	keys, ends := 0, 0
	s := scan(&watchCreateRequest, msg, f.body, f.end)
	for s.next() {
		switch s.field.num {
		case 1:
			key = s.body()
			keys++
		case 2:
			rangeEnd = s.body()
			ends++
		case watchCreateFragment:
			fragments = s.field.n != 0
		}
	}
	return keys > 1 || ends > 1 || len(key) == 0 || rules.Overlaps(key, rangeEnd), fragments, s.err
}

// AlarmAction returns the action of an AlarmRequest.
func AlarmAction(msg []byte) (int32, error) {
	action := int32(0)
	s := scan(&alarmRequest, msg, 0, len(msg))
	for s.next() {
		if s.field.num == 1 {
			action = s.field.int32()
		}
	}
	return action, s.err
}

// WholeFields returns how many bytes at the front of b are whole fields, and how many the field has
// that follows them: 0 if b does not say, negative if it is no field.
func WholeFields(b []byte) (whole, next int) {
	for at := 0; ; at += next {
		rest := b[at:]
		num, typ, n := protowire.ConsumeTag(rest)
		switch {
		case n < 0 && len(rest) < 10: // a tag has at most ten bytes
			return at, 0
		case n < 0:
			return at, -1
		case typ != protowire.BytesType:
			if next = n + protowire.ConsumeFieldValue(num, typ, rest[n:]); next < n {
				if len(rest) < 20 { // so has a number
					return at, 0
				}
				return at, -1
			}
		default:
			length, m := protowire.ConsumeVarint(rest[n:])
			switch {
			case m < 0 && len(rest) < 20:
				return at, 0
			case m < 0 || length > math.MaxInt32:
				return at, -1
			}
			next = n + m + int(length)
		}
		if next > len(rest) {
			return at, next
		}
	}
}
