package etcdwire

import (
	"cmp"
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
// passes as it is, if it has no value. It returns msg itself if nothing changed; the error wraps
// [ErrMalformed] or [ErrValueProvided] or is the error of rules.Seal.
func PutRequest(msg []byte, rules Rules) ([]byte, error) {
	return rewrite(msg, rules, func(r *rewriter) error { return r.put(0, len(msg)) })
}

// put returns ErrValueProvided for a put that keeps its value and has one. The caller may go on:
// the value is replaced.
func (r *rewriter) put(at, end int) error {
	s := scan(&putRequest, r.src, at, end)
	p, ignoreValue := newPair(&s, putValueTag), false
	for s.next() {
		p.see(&s, 2)
		if s.field.num == 5 {
			ignoreValue = s.field.n != 0
		}
	}
	switch {
	case s.err != nil:
		return s.err
	case ignoreValue && p.value.field.end > p.value.field.body && r.rules.Overlaps(p.key, nil):
		return cmp.Or(r.edit(p, placeholder), ErrValueProvided)
	case ignoreValue:
		return nil
	}
	return r.edit(p, r.rules.Seal)
}

// placeholder stands for the value of a put that etcd refuses because it has one.
func placeholder([]byte, []byte) ([]byte, error) { return []byte{0}, nil }

// putInTxn leaves it to etcd to refuse a put that is to keep its value and has one, which is sent
// without the value: of several faults in a transaction etcd tells the first, and which one that is
// depends on etcd's own flags.
func (r *rewriter) putInTxn(f field) error {
	if err := r.put(f.body, f.end); !errors.Is(err, ErrValueProvided) {
		return err
	}
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
// transactions. A put that is to keep its value and has one goes on with another: etcd refuses it.
// It returns msg itself if nothing changed, and the shape that TxnResponse needs. The error wraps
// [ErrMalformed], or [ErrByValue] for a compare or a sort by value that meets a rule, or
// [ErrUnsupported], or is the error of rules.Seal.
func TxnRequest(msg []byte, rules Rules) ([]byte, *TxnShape, error) {
	var shape *TxnShape
	out, err := rewrite(msg, rules, func(r *rewriter) (err error) {
		shape, err = r.txn(0, len(msg), 1)
		return err
	})
	if err != nil {
		return nil, nil, err
	}
	return out, shape, nil
}

func (r *rewriter) txn(at, end, depth int) (*TxnShape, error) {
	if depth > maxTxnDepth {
		return nil, errTooDeep
	}
	var shape TxnShape
	successes, failures := 0, 0
	s := scan(&txnRequest, r.src, at, end)
	for s.next() {
		var err error
		switch f := s.field; f.num {
		case 1:
			err = r.compare(f.body, f.end)
		case 2:
			err = r.op(f, depth, &shape.success, successes)
			successes++
		case 3:
			err = r.op(f, depth, &shape.failure, failures)
			failures++
		}
		if err != nil {
			return nil, err
		}
	}
	if s.err != nil || (shape.success == nil && shape.failure == nil) {
		return nil, s.err
	}
	return &shape, nil
}

// compare refuses what would compare a plaintext with a ciphertext, and an operand that would reach
// etcd's log in plaintext even if the target makes the server ignore it.
func (r *rewriter) compare(at, end int) error {
	var key, rangeEnd []byte
	byValue := false
	s := scan(&compare, r.src, at, end)
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
	// A range that ends before it begins covers no key, but its operand would stand in etcd's log
	// all the same: so the key counts by itself.
	if s.err == nil && byValue && (r.rules.Overlaps(key, rangeEnd) || r.rules.Overlaps(key, nil)) {
		return fmt.Errorf("compare %w", ErrByValue)
	}
	return s.err
}

func (r *rewriter) op(f field, depth int, b *branch, index int) error {
	return r.within(f, func(r *rewriter, f field) error {
		s := scan(&requestOp, r.src, f.body, f.end)
		for s.next() {
			var err error
			var shape opShape
			switch f := s.field; f.num {
			case 1:
				shape.rng, _, err = rangeShape(r.src, f.body, f.end, r.rules)
			case 2:
				err = r.within(f, (*rewriter).putInTxn)
			case 3:
				_, _, err = keyRange(&deleteRequest, r.src, f.body, f.end)
			case 4:
				err = r.within(f, func(r *rewriter, f field) (err error) {
					shape.txn, err = r.txn(f.body, f.end, depth+1)
					return err
				})
			default:
				err = unknownOperation(f)
			}
			if err != nil {
				return err
			}
			b.set(index, shape)
		}
		return s.err
	})
}

// Name returns field 1 of a LockRequest, CampaignRequest or LeaderRequest: the name of the lock or
// election. It aliases msg; the error wraps [ErrMalformed].
func Name(msg []byte) ([]byte, error) { return first(&named, msg, 1) }

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
	leader, err := first(&named, msg, 1)
	if err != nil {
		return nil, err
	}
	return first(&leaderKey, leader, 2)
}

func first(sc *schema, msg []byte, num protowire.Number) ([]byte, error) {
	var found []byte
	s := scan(sc, msg, 0, len(msg))
	for s.next() {
		if s.field.num == num {
			found = s.body()
		}
	}
	return found, s.err
}
