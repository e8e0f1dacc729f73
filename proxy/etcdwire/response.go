package etcdwire

// Every function here appends to dst what the client gets for msg. They do not overlap. dst should
// have room for as many bytes as msg has: values are not longer than what is stored, and a dst that
// grows leaves plaintext behind. After an error, what follows dst is undefined. The error wraps
// [ErrMalformed], or is that of rules.Open.

// RangeResponse decrypts the values of a RangeResponse.
func RangeResponse(dst, msg []byte, rules Rules, shape RangeShape) ([]byte, error) {
	e := editor{rules: rules, src: msg, out: dst}
	if err := e.ranged(0, len(msg), shape); err != nil {
		return nil, err
	}
	return e.rest(), nil
}

// RangeStreamResponse decrypts the values of one chunk of a RangeStream.
func RangeStreamResponse(dst, msg []byte, rules Rules, shape RangeShape) ([]byte, error) {
	e := editor{rules: rules, src: msg, out: dst}
	s := scan(&streamResponse, msg, 0, len(msg))
	for s.next() {
		if s.field.num != 1 {
			continue
		}
		m := e.enter(s.field)
		if err := e.ranged(s.field.body, s.field.end, shape); err != nil {
			return nil, err
		}
		e.leave(s.field, m)
	}
	if s.err != nil {
		return nil, s.err
	}
	return e.rest(), nil
}

func (e *editor) ranged(at, end int, shape RangeShape) error {
	s := scan(&rangeResponse, e.src, at, end)
	for s.next() {
		if s.field.num == 2 {
			if err := e.keyValue(s.field, !shape.KeysOnly); err != nil {
				return err
			}
		}
	}
	return s.err
}

// PutResponse decrypts the previous value in a PutResponse.
func PutResponse(dst, msg []byte, rules Rules) ([]byte, error) {
	e := editor{rules: rules, src: msg, out: dst}
	if err := e.pairs(&putResponse, 0, len(msg), 2); err != nil {
		return nil, err
	}
	return e.rest(), nil
}

// DeleteRangeResponse decrypts the previous values in a DeleteRangeResponse.
func DeleteRangeResponse(dst, msg []byte, rules Rules) ([]byte, error) {
	e := editor{rules: rules, src: msg, out: dst}
	if err := e.pairs(&deleteResponse, 0, len(msg), 3); err != nil {
		return nil, err
	}
	return e.rest(), nil
}

// pairs decrypts the KeyValue in each field num of a message.
func (e *editor) pairs(sc *schema, at, end int, num int32) error {
	s := scan(sc, e.src, at, end)
	for s.next() {
		if int32(s.field.num) == num {
			if err := e.keyValue(s.field, true); err != nil {
				return err
			}
		}
	}
	return s.err
}

// TxnResponse decrypts the values in all responses of a TxnResponse. shape is what TxnRequest
// returned.
func TxnResponse(dst, msg []byte, rules Rules, shape *TxnShape) ([]byte, error) {
	e := editor{rules: rules, src: msg, out: dst}
	if err := e.responses(0, len(msg), shape, 1); err != nil {
		return nil, err
	}
	return e.rest(), nil
}

func (e *editor) responses(at, end int, shape *TxnShape, depth int) error {
	if depth > maxTxnDepth {
		return txnResponse.malformed("is nested too deep", 3)
	}
	var taken branch
	if shape != nil {
		taken = shape.failure
		s := scan(&txnResponse, e.src, at, end)
		for s.next() {
			if s.field.num == 2 && s.field.n != 0 {
				taken = shape.success
			}
		}
	}
	index := 0
	s := scan(&txnResponse, e.src, at, end)
	for s.next() {
		if s.field.num != 3 {
			continue
		}
		op := taken.at(index)
		index++
		if err := e.response(s.field, op, depth); err != nil {
			return err
		}
	}
	return s.err
}

func (e *editor) response(f field, op opShape, depth int) error {
	m := e.enter(f)
	s := scan(&responseOp, e.src, f.body, f.end)
	for s.next() {
		f, m := s.field, e.enter(s.field)
		var err error
		switch f.num {
		case 1:
			err = e.ranged(f.body, f.end, op.rng)
		case 2:
			err = e.pairs(&putResponse, f.body, f.end, 2)
		case 3:
			err = e.pairs(&deleteResponse, f.body, f.end, 3)
		case 4:
			err = e.responses(f.body, f.end, op.txn, depth+1)
		}
		if err != nil {
			return err
		}
		e.leave(f, m)
	}
	if s.err == nil {
		e.leave(f, m)
	}
	return s.err
}

// WatchResponse decrypts the values and previous values of a WatchResponse's events. The pair of a
// DELETE event has no value.
func WatchResponse(dst, msg []byte, rules Rules) ([]byte, error) {
	e := editor{rules: rules, src: msg, out: dst}
	s := scan(&watchResponse, msg, 0, len(msg))
	for s.next() {
		if s.field.num == watchEvents {
			if err := e.event(s.field); err != nil {
				return nil, err
			}
		}
	}
	if s.err != nil {
		return nil, s.err
	}
	return e.rest(), nil
}

// Fields of Event.
const (
	eventType = 1
	eventPair = 2
	eventPrev = 3
)

// event decrypts an event.
func (e *editor) event(f field) error {
	m := e.enter(f)
	s := scan(&event, e.src, f.body, f.end)
	for s.next() {
		if s.field.num != eventPair && s.field.num != eventPrev {
			continue
		}
		p, exists, err := e.pair(s.field)
		if err != nil {
			return err
		}
		if p.present || exists && (s.field.num == eventPrev || isPut(e.src, f)) {
			if err := e.openWithin(s.field, &p); err != nil {
				return err
			}
		}
	}
	if s.err == nil {
		e.leave(f, m)
	}
	return s.err
}

// isPut reports whether an event of src is a PUT, by its type, which may follow its pair.
func isPut(src []byte, f field) bool {
	s := scan(&event, src, f.body, f.end)
	for s.next() {
		if s.field.num == eventType {
			return s.field.int32() == 0
		}
	}
	return true
}

// keyValue decrypts the value of a KeyValue. An absent value is an empty one, which a strict rule
// may refuse, if absentToo is true and the key exists. Otherwise it was left out of the response.
func (e *editor) keyValue(f field, absentToo bool) error {
	p, exists, err := e.pair(f)
	if err != nil || (!p.present && (!absentToo || !exists)) {
		return err
	}
	return e.openWithin(f, &p)
}

// pair returns the pair of a KeyValue, and whether its key exists: every key that etcd holds has a
// version from 1 on. kine answers a delete with the pair of its tombstone, which has neither a
// version nor a value.
func (e *editor) pair(f field) (p pair, exists bool, err error) {
	s := scan(&keyValue, e.src, f.body, f.end)
	p = newPair(&s, kvValueTag)
	for s.next() {
		p.note(&s, 5)
		if s.field.num == 4 {
			exists = s.field.n != 0
		}
	}
	return p, exists, s.err
}

// openWithin decrypts the value of a pair, which is the submessage f.
func (e *editor) openWithin(f field, p *pair) error {
	m := e.enter(f)
	if err := e.open(p); err != nil {
		return err
	}
	e.leave(f, m)
	return nil
}
