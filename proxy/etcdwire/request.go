package etcdwire

import (
	"errors"
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"
)

// maxTxnDepth bounds the nesting of transactions. etcd itself sets no bound; nothing real nests
// more than a few levels.
const maxTxnDepth = 64

// Tags of the value fields: number<<3 | length-delimited.
const (
	putValueTag = 2<<3 | byte(protowire.BytesType)
	kvValueTag  = 5<<3 | byte(protowire.BytesType)
)

// Enums of RangeRequest.sort_target and Compare.target.
const (
	sortByValue    = 4
	compareToValue = 3
)

// RangeShape is what the response to a range does not say about itself.
type RangeShape struct {
	KeysOnly bool // the response carries no values, so an absent one is not an empty one
}

// TxnShape is the RangeShape of every range in a transaction. A nil *TxnShape means that none is
// keys_only.
type TxnShape struct{ success, failure branch }

type branch []opShape

type opShape struct {
	rng RangeShape
	txn *TxnShape
}

func (b branch) at(i int) opShape {
	if i < len(b) {
		return b[i]
	}
	return opShape{}
}

func (b *branch) set(i int, s opShape) {
	if s == (opShape{}) {
		return
	}
	for len(*b) <= i {
		*b = append(*b, opShape{})
	}
	(*b)[i] = s
}

// PutRequest encrypts the value of a PutRequest, an absent one too. With ignore_value the message
// passes as it is, if it has no value. It returns msg itself if nothing changed, and else appends
// the new message to dst, for which it allocates memory if dst is nil. The error wraps
// [ErrMalformed] or [ErrValueProvided] or is the error of rules.Seal.
func PutRequest(dst, msg []byte, rules Rules) ([]byte, error) {
	e := editor{rules: rules, src: msg, out: dst}
	if err := e.put(0, len(msg)); err != nil {
		return nil, err
	}
	return e.request(), nil
}

// request returns the new message, or src if nothing changed.
func (e *editor) request() []byte {
	if e.edits == 0 {
		return e.src
	}
	return e.rest()
}

// put returns ErrValueProvided for a put that keeps its value and has one. The caller may go on:
// the value is replaced.
func (e *editor) put(at, end int) error {
	s := scan(&putRequest, e.src, at, end)
	p, ignoreValue := newPair(&s, putValueTag), false
	for s.next() {
		p.note(&s, 2)
		if s.field.num == 5 {
			ignoreValue = s.field.n != 0
		}
	}
	switch {
	case s.err != nil:
		return s.err
	case ignoreValue && p.value.end > p.value.body && e.rules.Overlaps(p.key, nil):
		e.replace(&p)
		return ErrValueProvided
	case ignoreValue:
		return nil
	}
	return e.seal(&p)
}

// putInTxn leaves it to etcd to refuse a put that is to keep its value and has one, which is sent
// with another value: of several faults in a transaction etcd tells the first, and which one that
// is depends on etcd's own flags.
func (e *editor) putInTxn(f field) error {
	m := e.enter(f)
	if err := e.put(f.body, f.end); err != nil && !errors.Is(err, ErrValueProvided) {
		return err
	}
	e.leave(f, m)
	return nil
}

// RangeRequest checks a RangeRequest and returns what the rewriter of its response needs, and
// whether it can meet a key under a rule. The error wraps [ErrMalformed], or [ErrByValue] for a
// sort by value that meets a rule: etcd would sort ciphertexts. The other results are good with the
// latter, too.
func RangeRequest(msg []byte, rules Rules) (shape RangeShape, touches bool, err error) {
	return rangeShape(msg, 0, len(msg), rules)
}

func rangeShape(src []byte, at, end int, rules Rules) (shape RangeShape, touches bool, err error) {
	var key, rangeEnd []byte
	byValue := false
	s := scan(&rangeRequest, src, at, end)
	for s.next() {
		switch f := s.field; f.num {
		case 1:
			key = s.body()
		case 2:
			rangeEnd = s.body()
		case 6:
			byValue = f.int32() == sortByValue
		case 8:
			shape.KeysOnly = f.n != 0
		}
	}
	if s.err != nil {
		return shape, false, s.err
	}
	if touches = rules.Overlaps(key, rangeEnd); touches && byValue {
		return shape, touches, fmt.Errorf("sort %w", ErrByValue)
	}
	return shape, touches, nil
}

// TxnRequest encrypts the values of all puts of a TxnRequest, in both branches and in nested
// transactions. A put that is to keep its value and has one is sent with another: etcd refuses it.
// It returns msg itself if nothing changed, and else appends the new message to dst, for which it
// allocates memory if dst is nil. The shape is what TxnResponse needs. The error wraps
// [ErrMalformed], or [ErrByValue] for a compare or a sort by value that meets a rule, or
// [ErrUnsupported], or is the error of rules.Seal.
func TxnRequest(dst, msg []byte, rules Rules) ([]byte, *TxnShape, error) {
	e := editor{rules: rules, src: msg, out: dst}
	shape, err := e.txn(0, len(msg), 1)
	if err != nil {
		return nil, nil, err
	}
	return e.request(), shape, nil
}

func (e *editor) txn(at, end, depth int) (*TxnShape, error) {
	if depth > maxTxnDepth {
		return nil, errTooDeep
	}
	var success, failure branch
	successes, failures := 0, 0
	s := scan(&txnRequest, e.src, at, end)
	for s.next() {
		var err error
		switch f := s.field; f.num {
		case 1:
			err = e.compare(f.body, f.end)
		case 2:
			err = e.op(f, depth, &success, successes)
			successes++
		case 3:
			err = e.op(f, depth, &failure, failures)
			failures++
		}
		if err != nil {
			return nil, err
		}
	}
	if s.err != nil || (success == nil && failure == nil) {
		return nil, s.err
	}
	return &TxnShape{success, failure}, nil
}

// compare refuses what would compare a plaintext with a ciphertext, and an operand that would reach
// etcd's log in plaintext even if the target makes the server ignore it.
func (e *editor) compare(at, end int) error {
	var key, rangeEnd []byte
	byValue := false
	s := scan(&compare, e.src, at, end)
	for s.next() {
		switch f := s.field; f.num {
		case 2:
			byValue = byValue || f.int32() == compareToValue
		case 3:
			key = s.body()
		case 7:
			byValue = byValue || f.end > f.body
		case 64:
			rangeEnd = s.body()
		}
	}
	// A range that ends before it begins covers no key, but its operand would be in etcd's log all
	// the same: so the key counts alone.
	if s.err == nil && byValue && (e.rules.Overlaps(key, rangeEnd) || e.rules.Overlaps(key, nil)) {
		return fmt.Errorf("compare %w", ErrByValue)
	}
	return s.err
}

func (e *editor) op(f field, depth int, b *branch, index int) error {
	m := e.enter(f)
	s := scan(&requestOp, e.src, f.body, f.end)
	for s.next() {
		var err error
		var shape opShape
		switch f := s.field; f.num {
		case 1:
			shape.rng, _, err = rangeShape(e.src, f.body, f.end, e.rules)
		case 2:
			err = e.putInTxn(f)
		case 3:
			_, _, err = keyRange(&deleteRequest, e.src, f.body, f.end)
		case 4:
			m := e.enter(f)
			if shape.txn, err = e.txn(f.body, f.end, depth+1); err == nil {
				e.leave(f, m)
			}
		default:
			err = unknownOperation(f)
		}
		if err != nil {
			return err
		}
		b.set(index, shape)
	}
	if s.err == nil {
		e.leave(f, m)
	}
	return s.err
}

// Name returns field 1 of a LockRequest, CampaignRequest or LeaderRequest: the name of the lock or
// election. It aliases msg; the error wraps [ErrMalformed].
func Name(msg []byte) ([]byte, error) { return lastBytesField(&named, msg, 1) }

// LeaseID returns the ID of a LeaseRevokeRequest. The error wraps [ErrMalformed].
func LeaseID(msg []byte) (int64, error) {
	var id int64
	s := scan(&leaseRequest, msg, 0, len(msg))
	for s.next() {
		if s.field.num == 1 {
			id = int64(s.field.n) //nolint:gosec // as the wire format has it
		}
	}
	return id, s.err
}

// LeaderKey returns the etcd key that a ProclaimRequest or ResignRequest is about: field 2 of its
// field 1. It aliases msg; the error wraps [ErrMalformed].
func LeaderKey(msg []byte) ([]byte, error) {
	leader, err := lastBytesField(&named, msg, 1)
	if err != nil {
		return nil, err
	}
	return lastBytesField(&leaderKey, leader, 2)
}

func lastBytesField(sc *schema, msg []byte, num protowire.Number) ([]byte, error) {
	var found []byte
	s := scan(sc, msg, 0, len(msg))
	for s.next() {
		if s.field.num == num {
			found = s.body()
		}
	}
	return found, s.err
}
