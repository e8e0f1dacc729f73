package etcdwire

import (
	"sync"

	"google.golang.org/protobuf/encoding/protowire"
)

// Every function here appends to dst what the client gets for msg. They do not overlap. dst should
// have room for as many bytes as msg has: values are not longer than what is stored, and a dst that
// grows leaves plaintext behind. After an error, what follows dst is undefined. The error wraps
// [ErrMalformed], or is that of rules.Open.

// opener copies a message from src to out, with its values decrypted.
type opener struct {
	rules    Rules
	src, out []byte
	at       int // in src: what precedes is in out
}

var openers = sync.Pool{New: func() any { return new(opener) }}

// open runs walk, which decrypts the values, and copies the rest.
func open(dst, msg []byte, rules Rules, walk func(*opener) error) ([]byte, error) {
	o, ok := openers.Get().(*opener)
	if !ok {
		o = new(opener)
	}
	defer func() {
		*o = opener{} // the pool must not keep values alive
		openers.Put(o)
	}()
	*o = opener{rules: rules, src: msg, out: dst}
	if err := walk(o); err != nil {
		return nil, err
	}
	o.copyTo(len(msg))
	return o.out, nil
}

// copyTo copies up to an offset in src.
func (o *opener) copyTo(end int) {
	o.out = append(o.out, o.src[o.at:end]...)
	o.at = end
}

// within runs walk over the submessage f and corrects its length prefix.
func (o *opener) within(f field, walk func(o *opener, f field) error) error {
	o.copyTo(f.body)
	start := len(o.out)
	if err := walk(o, f); err != nil {
		return err
	}
	o.copyTo(f.end)
	o.setLength(start, f)
	return nil
}

// setLength corrects the length prefix of f, whose contents begin at start in out. Contents that
// have kept their length keep its encoding, too.
func (o *opener) setLength(start int, f field) {
	length, was := len(o.out)-start, f.body-f.val
	if length == f.end-f.body {
		return
	}
	size := protowire.SizeVarint(uint64(length)) //nolint:gosec // not negative
	if size > was {
		o.out = append(o.out, make([]byte, size-was)...)
	}
	copy(o.out[start-was+size:], o.out[start:start+length])
	o.out = o.out[:start-was+size+length]
	protowire.AppendVarint(o.out[:start-was], uint64(length)) //nolint:gosec // not negative
}

// RangeResponse decrypts the values of a RangeResponse.
func RangeResponse(dst, msg []byte, rules Rules, shape RangeShape) ([]byte, error) {
	return open(dst, msg, rules, func(o *opener) error { return o.ranged(0, len(msg), shape) })
}

// RangeStreamResponse decrypts the values of one chunk of a RangeStream.
func RangeStreamResponse(dst, msg []byte, rules Rules, shape RangeShape) ([]byte, error) {
	return open(dst, msg, rules, func(o *opener) error {
		s := scan(&streamResponse, o.src, 0, len(msg))
		for s.next() {
			if s.field.num == 1 {
				if err := o.within(s.field, func(o *opener, f field) error { return o.ranged(f.body, f.end, shape) }); err != nil {
					return err
				}
			}
		}
		return s.err
	})
}

func (o *opener) ranged(at, end int, shape RangeShape) error {
	s := scan(&rangeResponse, o.src, at, end)
	open := openPair
	if shape.KeysOnly {
		open = openPresent
	}
	for s.next() {
		if s.field.num == 2 {
			if err := o.within(s.field, open); err != nil {
				return err
			}
		}
	}
	return s.err
}

// PutResponse decrypts the previous value in a PutResponse.
func PutResponse(dst, msg []byte, rules Rules) ([]byte, error) {
	return open(dst, msg, rules, func(o *opener) error { return o.pairs(&putResponse, 0, len(msg), 2) })
}

// DeleteRangeResponse decrypts the previous values in a DeleteRangeResponse.
func DeleteRangeResponse(dst, msg []byte, rules Rules) ([]byte, error) {
	return open(dst, msg, rules, func(o *opener) error { return o.pairs(&deleteResponse, 0, len(msg), 3) })
}

// pairs opens the KeyValue in each field num of a message.
func (o *opener) pairs(sc *schema, at, end int, num int32) error {
	s := scan(sc, o.src, at, end)
	for s.next() {
		if int32(s.field.num) == num {
			if err := o.within(s.field, openPair); err != nil {
				return err
			}
		}
	}
	return s.err
}

// TxnResponse decrypts the values in all responses of a TxnResponse. shape is what TxnRequest
// returned.
func TxnResponse(dst, msg []byte, rules Rules, shape *TxnShape) ([]byte, error) {
	return open(dst, msg, rules, func(o *opener) error { return o.responses(0, len(msg), shape, 1) })
}

func (o *opener) responses(at, end int, shape *TxnShape, depth int) error {
	if depth > maxTxnDepth {
		return txnResponse.malformed("is nested too deep", 3)
	}
	var taken branch
	if shape != nil {
		taken = shape.failure
		s := scan(&txnResponse, o.src, at, end)
		for s.next() {
			if s.field.num == 2 && s.field.n != 0 {
				taken = shape.success
			}
		}
	}
	index := 0
	s := scan(&txnResponse, o.src, at, end)
	for s.next() {
		if s.field.num != 3 {
			continue
		}
		op := taken.at(index)
		index++
		if err := o.within(s.field, func(o *opener, f field) error { return o.response(f, op, depth) }); err != nil {
			return err
		}
	}
	return s.err
}

func (o *opener) response(f field, op opShape, depth int) error {
	s := scan(&responseOp, o.src, f.body, f.end)
	for s.next() {
		var err error
		switch s.field.num {
		case 1:
			err = o.within(s.field, func(o *opener, f field) error { return o.ranged(f.body, f.end, op.rng) })
		case 2:
			err = o.within(s.field, func(o *opener, f field) error { return o.pairs(&putResponse, f.body, f.end, 2) })
		case 3:
			err = o.within(s.field, func(o *opener, f field) error { return o.pairs(&deleteResponse, f.body, f.end, 3) })
		case 4:
			err = o.within(s.field, func(o *opener, f field) error { return o.responses(f.body, f.end, op.txn, depth+1) })
		}
		if err != nil {
			return err
		}
	}
	return s.err
}

// WatchResponse decrypts the values and previous values of a WatchResponse's events. The pair of a
// DELETE event has no value.
func WatchResponse(dst, msg []byte, rules Rules) ([]byte, error) {
	return open(dst, msg, rules, func(o *opener) error {
		s := scan(&watchResponse, o.src, 0, len(msg))
		for s.next() {
			if s.field.num == 11 {
				if err := o.within(s.field, openEvent); err != nil {
					return err
				}
			}
		}
		return s.err
	})
}

func openEvent(o *opener, f field) error {
	// The type decides how to read the pair, and need not stand before it.
	isPut := true
	s := scan(&event, o.src, f.body, f.end)
	for s.next() {
		if s.field.num == 1 {
			isPut = s.field.int32() == 0
		}
	}
	if s.err != nil {
		return s.err
	}
	s = scan(&event, o.src, f.body, f.end)
	for s.next() {
		open := openPair
		switch {
		case s.field.num != 2 && s.field.num != 3:
			continue
		case s.field.num == 2 && !isPut:
			open = openPresent
		}
		if err := o.within(s.field, open); err != nil {
			return err
		}
	}
	return s.err
}

// openPair decrypts the value of a KeyValue. An absent value is an empty one, which a strict rule
// may refuse, if the key exists: every key that etcd holds has a version from 1 on. kine answers a
// delete with the pair of its tombstone, which has neither.
func openPair(o *opener, f field) error { return o.open(f, true) }

// openPresent decrypts the value of a KeyValue that may have been left out of the response.
func openPresent(o *opener, f field) error { return o.open(f, false) }

func (o *opener) open(f field, absentToo bool) error {
	s := scan(&keyValue, o.src, f.body, f.end)
	p := newPair(&s, kvValueTag)
	exists := false
	for s.next() {
		p.see(&s, 5)
		if s.field.num == 4 {
			exists = s.field.n != 0
		}
	}
	if s.err != nil || (!p.value.present && (!absentToo || !exists)) {
		return s.err
	}
	v := p.value.field
	var stored []byte
	if p.value.present {
		stored = o.src[v.body:v.end:v.end]
		o.copyTo(v.body)
		o.at = v.end
	} else {
		o.copyTo(p.value.at)
		o.out = append(o.out, p.value.tag, 0)
		v = field{val: 1, body: 2, end: 2}
	}
	start := len(o.out)
	out, err := o.rules.Open(o.out, p.key, stored)
	if err != nil {
		return err
	}
	if o.out = out; len(out) == start && (len(stored) > 0 || !p.value.present) {
		o.out = out[:start-(v.body-v.start)] // the encoders of etcd leave out an empty value
		return nil
	}
	o.setLength(start, v)
	return nil
}
