package etcdwire

import (
	"context"
	"sync"

	"google.golang.org/protobuf/encoding/protowire"
)

// edit replaces src[from:to] by an optional tag, an optional length prefix and bytes.
type edit struct {
	from, to int
	tag      byte // 0: none
	length   int  // -1: none
	with     []byte
}

// rewriter gathers the edits of one field of a message, in the order of their offsets, and then writes the field, however deep a changed value
// sits. So a long answer is written while it is still at hand in the processor's cache.
type rewriter struct {
	ctx     context.Context // a rewriter lives for one call
	rules   Rules
	src     []byte
	inPlace bool // out is, or will be, the front of src

	edits []edit
	grow  int  // by how much the edits lengthen the message
	grown bool // some edit lengthens it
	depth int  // of submessages around what is being walked

	out     []byte // the message up to src[:written], once something changed
	written int
}

var rewriters = sync.Pool{New: func() any { return new(rewriter) }}

// rewrite runs walk over msg and returns msg with the edits that walk asked for: msg itself if there were none. With inPlace it may write the
// result over msg.
func rewrite(ctx context.Context, msg []byte, rules Rules, inPlace bool, walk func(*rewriter) error) ([]byte, error) {
	r, ok := rewriters.Get().(*rewriter)
	if !ok {
		r = new(rewriter)
	}
	r.ctx, r.rules, r.src, r.inPlace = ctx, rules, msg, inPlace
	defer func() {
		clear(r.edits) // the pool must not keep values alive
		*r = rewriter{edits: r.edits[:0]}
		rewriters.Put(r)
	}()
	if err := walk(r); err != nil {
		return nil, err
	}
	r.flush()
	if r.out == nil {
		return msg, nil
	}
	return append(r.out, msg[r.written:]...), nil
}

// flush writes what the edits so far make of the message. No length prefix before them may still be open.
func (r *rewriter) flush() {
	if len(r.edits) == 0 {
		return
	}
	switch {
	case r.inPlace && !r.grown:
		// Every edit leaves at most as many bytes as it takes away, so nothing is written ahead of what is still to be read.
		if r.out == nil {
			r.out = r.src[:0]
		}
	case r.out == nil || r.inPlace:
		r.out = append(make([]byte, 0, len(r.src)+len(r.out)-r.written+r.grow), r.out...)
		r.inPlace = false
	}
	at := r.written
	for _, e := range r.edits {
		r.out = append(r.out, r.src[at:e.from]...)
		if e.tag != 0 {
			r.out = append(r.out, e.tag)
		}
		if e.length >= 0 {
			r.out = protowire.AppendVarint(r.out, uint64(e.length))
		}
		r.out = append(r.out, e.with...)
		at = e.to
	}
	r.written = at
	clear(r.edits)
	r.edits, r.grow, r.grown = r.edits[:0], 0, false
}

func (r *rewriter) add(e edit) {
	by := len(e.with) - (e.to - e.from)
	if e.tag != 0 {
		by++
	}
	if e.length >= 0 {
		by += protowire.SizeVarint(uint64(e.length))
	}
	r.grow += by
	r.grown = r.grown || by > 0
	r.edits = append(r.edits, e)
}

// within runs walk over the submessage f and mends its length prefix if walk changed anything in it.
func (r *rewriter) within(f field, walk func(r *rewriter, f field) error) error {
	// The prefix stands before what is in it, so its edit is reserved now and filled or dropped afterwards.
	index, before := len(r.edits), r.grow
	r.edits = append(r.edits, edit{from: f.val, to: f.body, length: -1})
	r.depth++
	err := walk(r, f)
	r.depth--
	if err != nil {
		return err
	}
	if len(r.edits) == index+1 {
		r.edits = r.edits[:index]
		return nil
	}
	length := f.end - f.body + r.grow - before
	r.edits[index].length = length
	by := protowire.SizeVarint(uint64(length)) - (f.body - f.val) //nolint:gosec // not negative
	r.grow += by
	r.grown = r.grown || by > 0
	if r.depth == 0 {
		r.flush()
	}
	return nil
}

// value is the place of a value in its message: the field itself, or where it would stand.
type value struct {
	tag     byte
	present bool
	field   field
	at      int // where an absent field belongs: before the first field with a higher number
}

// set replaces the value by with. A value that becomes empty loses its field, as the encoders of etcd write it.
func (r *rewriter) set(v value, with []byte) {
	switch {
	case v.present && len(with) == 0:
		r.add(edit{from: v.field.start, to: v.field.end, length: -1})
	case v.present:
		r.add(edit{from: v.field.val, to: v.field.end, length: len(with), with: with})
	default:
		r.add(edit{from: v.at, to: v.at, tag: v.tag, length: len(with), with: with})
	}
}

// same reports whether b is the very slice a: how Rules says that nothing changed.
func same(a, b []byte) bool {
	return len(a) == len(b) && (len(a) == 0 || &a[0] == &b[0])
}

// pair is a key and the place of its value, in a KeyValue or a PutRequest.
type pair struct {
	key   []byte
	value value
}

// edit applies f to the pair's value. An absent value is handed over as nil.
func (r *rewriter) edit(p pair, f func(ctx context.Context, key, value []byte) ([]byte, error)) error {
	var old []byte
	if p.value.present {
		old = r.src[p.value.field.body:p.value.field.end:p.value.field.end]
	}
	changed, err := f(r.ctx, p.key, old)
	if err != nil {
		return err
	}
	if !same(old, changed) {
		r.set(p.value, changed)
	}
	return nil
}

// see takes note of the scanner's field, of a message whose value has number num.
func (p *pair) see(s *scanner, num protowire.Number) {
	switch s.field.num {
	case num:
		p.value.present, p.value.field = true, s.field
	case 1:
		p.key = s.body()
	}
	if s.field.num > num && p.value.at == s.end {
		p.value.at = s.field.start
	}
}

func newPair(s *scanner, tag byte) pair { return pair{value: value{tag: tag, at: s.end}} }
