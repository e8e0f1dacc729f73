package etcdwire

import (
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

// rewriter gathers the edits of a request, in the order of their offsets.
type rewriter struct {
	rules Rules
	src   []byte
	edits []edit
	grow  int // by how much the edits lengthen the message
}

var rewriters = sync.Pool{New: func() any { return new(rewriter) }}

// keptEdits is how many edits a rewriter has room for when it goes back to the pool.
const keptEdits = 4096

// rewrite runs walk over msg and returns msg with the edits that walk requested: msg itself if
// there were none.
func rewrite(msg []byte, rules Rules, walk func(*rewriter) error) ([]byte, error) {
	r, ok := rewriters.Get().(*rewriter)
	if !ok {
		r = new(rewriter)
	}
	r.rules, r.src = rules, msg
	defer func() {
		clear(r.edits) // the pool must not keep values alive
		if cap(r.edits) > keptEdits {
			r.edits = nil
		}
		*r = rewriter{edits: r.edits[:0]}
		rewriters.Put(r)
	}()
	if err := walk(r); err != nil {
		return nil, err
	}
	if len(r.edits) == 0 {
		return msg, nil
	}
	out := make([]byte, 0, len(msg)+r.grow)
	at := 0
	for _, e := range r.edits {
		out = append(out, msg[at:e.from]...)
		if e.tag != 0 {
			out = append(out, e.tag)
		}
		if e.length >= 0 {
			out = protowire.AppendVarint(out, uint64(e.length))
		}
		out = append(out, e.with...)
		at = e.to
	}
	return append(out, msg[at:]...), nil
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
	r.edits = append(r.edits, e)
}

// within runs walk over the submessage f and corrects its length prefix if walk changed anything in
// it.
func (r *rewriter) within(f field, walk func(r *rewriter, f field) error) error {
	// The prefix stands before what is in it, so its edit is reserved now and filled or dropped
	// afterwards.
	index, before := len(r.edits), r.grow
	r.edits = append(r.edits, edit{from: f.val, to: f.body, length: -1})
	if err := walk(r, f); err != nil {
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
	return nil
}

// value is the place of a value in its message: the field itself, or where it would stand.
type value struct {
	tag     byte
	present bool
	field   field
	at      int // where an absent field belongs: before the first field with a higher number
}

// set replaces the value by with. A value that becomes empty loses its field, as the encoders of
// etcd write it.
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
func (r *rewriter) edit(p pair, f func(key, value []byte) ([]byte, error)) error {
	var old []byte
	if p.value.present {
		old = r.src[p.value.field.body:p.value.field.end:p.value.field.end]
	}
	changed, err := f(p.key, old)
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
