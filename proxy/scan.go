package proxy

import (
	"fmt"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

// What follows reads just enough of a request to tell whether its answer can hold a sealed value, so that the answers of other
// ranges pass without a look inside. Whatever is not plainly one key or one range counts as touching a rule.

// keyRange returns the fields 1 (key) and 2 (range_end) of a request. ok is false if a field stands there twice, or the
// message cannot be decoded. The results alias msg.
func keyRange(msg []byte) (key, end []byte, ok bool) {
	var seen [3]bool
	for len(msg) > 0 {
		num, typ, n := protowire.ConsumeTag(msg)
		if n < 0 {
			return nil, nil, false
		}
		msg = msg[n:]
		if (num == 1 || num == 2) && typ == protowire.BytesType {
			v, n := protowire.ConsumeBytes(msg)
			if n < 0 || seen[num] {
				return nil, nil, false
			}
			seen[num] = true
			if num == 1 {
				key = v
			} else {
				end = v
			}
			msg = msg[n:]
			continue
		}
		if n = protowire.ConsumeFieldValue(num, typ, msg); n < 0 {
			return nil, nil, false
		}
		msg = msg[n:]
	}
	return key, end, true
}

// putCovered reports whether a PutRequest writes a key under a rule. Field 2 of a put is its value, not a range's end.
func putCovered(msg []byte, rules *ruleSet) bool {
	key, _, ok := keyRange(msg)
	return !ok || rules.covers(key)
}

// putReach and deleteReach say what a PutRequest and a DeleteRangeRequest would do to the proxies'
// own keys. ok is false for a message that is not plainly one, which the rewriter refuses.
func putReach(msg []byte, rules *ruleSet) (what reach, ok bool) {
	key, _, ok := keyRange(msg)
	return rules.own.reach(key, nil), ok
}

func deleteReach(msg []byte, rules *ruleSet) (what reach, ok bool) {
	key, end, ok := keyRange(msg)
	return rules.own.reach(key, end), ok
}

// rangeTouches reports whether a RangeRequest or DeleteRangeRequest can meet a key under a rule.
func rangeTouches(msg []byte, rules *ruleSet) bool {
	key, end, ok := keyRange(msg)
	return !ok || rules.Overlaps(key, end)
}

// Field numbers of etcdserverpb.TxnRequest and RequestOp.
const (
	txnSuccess, txnFailure               = 2, 3
	opRange, opPut, opDeleteRange, opTxn = 1, 2, 3, 4
	maxTxnDepth                          = 64
)

// txnReach is what a transaction can do, over both branches and all nested transactions.
type txnReach struct {
	odd     bool // it is not plainly a transaction, and may do anything; the rewriter refuses it
	touches bool // some answer may hold a sealed value
	changes bool // there is a put or a delete at all: etcd sends the transaction through raft
	own     bool // some put or delete names keys of the proxies' own
	over    bool // some delete reaches over keys of the proxies' own
}

func (r *txnReach) change(touched bool, what reach, ok bool) {
	r.changes, r.touches, r.odd = true, r.touches || touched, r.odd || !ok
	r.own, r.over = r.own || what == reachesOwn, r.over || what == reachesOver
}

func scanTxn(msg []byte, rules *ruleSet, depth int, r *txnReach) {
	everything := txnReach{odd: true, touches: true, changes: true}
	if depth > maxTxnDepth {
		*r = everything
		return
	}
	for len(msg) > 0 {
		num, typ, n := protowire.ConsumeTag(msg)
		if n < 0 {
			*r = everything
			return
		}
		msg = msg[n:]
		if (num != txnSuccess && num != txnFailure) || typ != protowire.BytesType {
			if n = protowire.ConsumeFieldValue(num, typ, msg); n < 0 {
				*r = everything
				return
			}
			msg = msg[n:]
			continue
		}
		op, n := protowire.ConsumeBytes(msg)
		if n < 0 {
			*r = everything
			return
		}
		msg = msg[n:]
		for len(op) > 0 {
			num, typ, n := protowire.ConsumeTag(op)
			if n < 0 {
				*r = everything
				return
			}
			op = op[n:]
			if typ != protowire.BytesType {
				if n = protowire.ConsumeFieldValue(num, typ, op); n < 0 {
					*r = everything
					return
				}
				op = op[n:]
				continue
			}
			arm, n := protowire.ConsumeBytes(op)
			if n < 0 {
				*r = everything
				return
			}
			op = op[n:]
			switch num {
			case opRange:
				r.touches = r.touches || rangeTouches(arm, rules)
			case opPut:
				what, ok := putReach(arm, rules)
				r.change(putCovered(arm, rules), what, ok)
			case opDeleteRange:
				what, ok := deleteReach(arm, rules)
				r.change(rangeTouches(arm, rules), what, ok)
			case opTxn:
				scanTxn(arm, rules, depth+1, r)
			default: // unknown
				r.change(true, reachesNone, false)
			}
		}
	}
}

// watchTouches reports whether a WatchRequest creates a watch that can meet a key under a rule. An undecodable request is an error.
func watchTouches(msg []byte, rules *ruleSet) (bool, error) {
	const createRequest = 1
	touches, creates := false, 0
	for len(msg) > 0 {
		num, typ, n := protowire.ConsumeTag(msg)
		if n < 0 {
			return false, fmt.Errorf("watch request: %w", etcdwire.ErrMalformed)
		}
		msg = msg[n:]
		if n = protowire.ConsumeFieldValue(num, typ, msg); n < 0 {
			return false, fmt.Errorf("watch request: %w", etcdwire.ErrMalformed)
		}
		if num == createRequest && typ == protowire.BytesType {
			create, _ := protowire.ConsumeBytes(msg)
			key, end, ok := keyRange(create)
			// Two create requests in one message are merged by the server: key of one, range end of the other. An empty key
			// means the first key there can be.
			creates++
			touches = touches || !ok || creates > 1 || len(key) == 0 || rules.Overlaps(key, end)
		}
		msg = msg[n:]
	}
	return touches, nil
}
