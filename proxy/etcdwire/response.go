package etcdwire

// Every function here returns msg itself if nothing changed. Otherwise it has overwritten msg, and
// the result may be a part of it; after an error, msg holds nothing of use. The error wraps
// [ErrMalformed], or is that of rules.Open.

// RangeResponse decrypts the values of a RangeResponse.
func RangeResponse(msg []byte, rules Rules, shape RangeShape) ([]byte, error) {
	return rewrite(msg, rules, true, func(r *rewriter) error { return r.ranged(0, len(msg), shape) })
}

// RangeStreamResponse decrypts the values of one chunk of a RangeStream.
func RangeStreamResponse(msg []byte, rules Rules, shape RangeShape) ([]byte, error) {
	return rewrite(msg, rules, true, func(r *rewriter) error {
		s := scan(&streamResponse, r.src, 0, len(msg))
		for s.next() {
			if s.field.num == 1 {
				if err := r.within(s.field, func(r *rewriter, f field) error { return r.ranged(f.body, f.end, shape) }); err != nil {
					return err
				}
			}
		}
		return s.err
	})
}

func (r *rewriter) ranged(at, end int, shape RangeShape) error {
	s := scan(&rangeResponse, r.src, at, end)
	open := openPair
	if shape.KeysOnly {
		open = openPresent
	}
	for s.next() {
		if s.field.num == 2 {
			if err := r.within(s.field, open); err != nil {
				return err
			}
		}
	}
	return s.err
}

// PutResponse decrypts the previous value in a PutResponse.
func PutResponse(msg []byte, rules Rules) ([]byte, error) {
	return rewrite(msg, rules, true, func(r *rewriter) error { return r.pairs(&putResponse, 0, len(msg), 2) })
}

// DeleteRangeResponse decrypts the previous values in a DeleteRangeResponse.
func DeleteRangeResponse(msg []byte, rules Rules) ([]byte, error) {
	return rewrite(msg, rules, true, func(r *rewriter) error { return r.pairs(&deleteResponse, 0, len(msg), 3) })
}

// pairs opens the KeyValue in each field num of a message.
func (r *rewriter) pairs(sc *schema, at, end int, num int32) error {
	s := scan(sc, r.src, at, end)
	for s.next() {
		if int32(s.field.num) == num {
			if err := r.within(s.field, openPair); err != nil {
				return err
			}
		}
	}
	return s.err
}

// TxnResponse decrypts the values in all responses of a TxnResponse. shape is what TxnRequest
// returned.
func TxnResponse(msg []byte, rules Rules, shape *TxnShape) ([]byte, error) {
	return rewrite(msg, rules, true, func(r *rewriter) error { return r.responses(0, len(msg), shape, 1) })
}

func (r *rewriter) responses(at, end int, shape *TxnShape, depth int) error {
	if depth > maxTxnDepth {
		return txnResponse.malformed("is nested too deep", 3)
	}
	var taken branch
	if shape != nil {
		taken = shape.failure
		s := scan(&txnResponse, r.src, at, end)
		for s.next() {
			if s.field.num == 2 && s.field.n != 0 {
				taken = shape.success
			}
		}
	}
	index := 0
	s := scan(&txnResponse, r.src, at, end)
	for s.next() {
		if s.field.num != 3 {
			continue
		}
		op := taken.at(index)
		index++
		if err := r.within(s.field, func(r *rewriter, f field) error { return r.response(f, op, depth) }); err != nil {
			return err
		}
	}
	return s.err
}

func (r *rewriter) response(f field, op opShape, depth int) error {
	s := scan(&responseOp, r.src, f.body, f.end)
	for s.next() {
		var err error
		switch s.field.num {
		case 1:
			err = r.within(s.field, func(r *rewriter, f field) error { return r.ranged(f.body, f.end, op.rng) })
		case 2:
			err = r.within(s.field, func(r *rewriter, f field) error { return r.pairs(&putResponse, f.body, f.end, 2) })
		case 3:
			err = r.within(s.field, func(r *rewriter, f field) error { return r.pairs(&deleteResponse, f.body, f.end, 3) })
		case 4:
			err = r.within(s.field, func(r *rewriter, f field) error { return r.responses(f.body, f.end, op.txn, depth+1) })
		}
		if err != nil {
			return err
		}
	}
	return s.err
}

// WatchResponse decrypts the values and previous values of a WatchResponse's events. The pair of a
// DELETE event has no value.
func WatchResponse(msg []byte, rules Rules) ([]byte, error) {
	return rewrite(msg, rules, true, func(r *rewriter) error {
		s := scan(&watchResponse, r.src, 0, len(msg))
		for s.next() {
			if s.field.num == 11 {
				if err := r.within(s.field, openEvent); err != nil {
					return err
				}
			}
		}
		return s.err
	})
}

func openEvent(r *rewriter, f field) error {
	// The type decides how to read the pair, and need not stand before it.
	isPut := true
	s := scan(&event, r.src, f.body, f.end)
	for s.next() {
		if s.field.num == 1 {
			isPut = s.field.int32() == 0
		}
	}
	if s.err != nil {
		return s.err
	}
	s = scan(&event, r.src, f.body, f.end)
	for s.next() {
		open := openPair
		switch {
		case s.field.num != 2 && s.field.num != 3:
			continue
		case s.field.num == 2 && !isPut:
			open = openPresent
		}
		if err := r.within(s.field, open); err != nil {
			return err
		}
	}
	return s.err
}

// openPair decrypts the value of a KeyValue. An absent value is an empty one, which a strict rule
// may refuse, if the key exists: every key that etcd holds has a version from 1 on. kine answers a
// delete with the pair of its tombstone, which has neither.
func openPair(r *rewriter, f field) error { return r.open(f, true) }

// openPresent decrypts the value of a KeyValue that may have been left out of the response.
func openPresent(r *rewriter, f field) error { return r.open(f, false) }

func (r *rewriter) open(f field, absentToo bool) error {
	s := scan(&keyValue, r.src, f.body, f.end)
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
	return r.edit(p, r.rules.Open)
}
