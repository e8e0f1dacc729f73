package etcdwire

import (
	"slices"

	"google.golang.org/protobuf/encoding/protowire"
)

// editor copies a message from src to out, with its values encrypted or decrypted. It copies when
// it meets a value, so that nothing is copied of a message without one.
type editor struct {
	rules    Rules
	src, out []byte
	at       int // in src: what precedes is in out
	edits    int // how many values were replaced
}

// headroom is how much longer than its plaintext a stored value usually is at most, in bytes.
const headroom = 512

// copyTo copies up to an offset in src.
func (e *editor) copyTo(end int) {
	e.out = append(e.out, e.src[e.at:end]...)
	e.at = end
}

// rest copies the rest of the message, and returns the result.
func (e *editor) rest() []byte {
	e.copyTo(len(e.src))
	return e.out
}

// mark is where the contents of a submessage begin, or will begin, in out, and the edits before.
type mark struct{ start, edits int }

// enter begins with the submessage f.
func (e *editor) enter(f field) mark { return mark{len(e.out) + f.body - e.at, e.edits} }

// leave corrects the length prefix of the submessage f if a value in it was replaced.
func (e *editor) leave(f field, m mark) {
	if e.edits != m.edits {
		e.copyTo(f.end)
		e.setLength(m.start, f)
	}
}

// setLength corrects the length prefix of f, whose contents begin at start in out. Contents that
// have kept their length keep its encoding, too.
func (e *editor) setLength(start int, f field) {
	length, was := len(e.out)-start, f.body-f.val
	if length == f.end-f.body {
		return
	}
	size := protowire.SizeVarint(uint64(length)) //nolint:gosec // not negative
	if size > was {
		e.out = append(e.out, make([]byte, size-was)...)
	}
	if size != was {
		copy(e.out[start-was+size:], e.out[start:start+length])
		e.out = e.out[:start-was+size+length]
	}
	protowire.AppendVarint(e.out[:start-was], uint64(length)) //nolint:gosec // not negative
}

// pair is a key and the place of its value, in a KeyValue or a PutRequest.
type pair struct {
	tag     byte // of the value
	present bool // the message has a value
	key     []byte
	value   field
	at      int // where an absent value belongs: before the first field with a higher number
}

func newPair(s *scanner, tag byte) pair { return pair{tag: tag, at: s.end} }

// note records the scanner's field, of a message whose value has number num.
func (p *pair) note(s *scanner, num protowire.Number) {
	switch s.field.num {
	case num:
		p.present, p.value = true, s.field
	case 1:
		p.key = s.body()
	}
	if s.field.num > num && p.at == s.end {
		p.at = s.field.start
	}
}

// stored returns the value of a pair, nil if it is absent.
func (e *editor) stored(p *pair) []byte {
	if !p.present {
		return nil
	}
	return e.src[p.value.body:p.value.end:p.value.end]
}

// begin copies what precedes the value of a pair, with the tag and the prefix of an absent one, and
// returns the value's field.
func (e *editor) begin(p *pair) field {
	if p.present {
		e.copyTo(p.value.body)
		e.at = p.value.end
		return p.value
	}
	e.copyTo(p.at)
	e.out = append(e.out, p.tag, 0)
	return field{val: 1, body: 2, end: 2}
}

// finish completes the value of a pair, which begins at start in out. The encoders of etcd leave
// out an empty value.
func (e *editor) finish(p *pair, f field, start int) {
	e.edits++
	if len(e.out) == start && (!p.present || f.end > f.body) {
		e.out = e.out[:start-(f.body-f.start)]
		return
	}
	e.setLength(start, f)
}

// open decrypts the value of a pair.
func (e *editor) open(p *pair) error {
	stored := e.stored(p)
	f := e.begin(p)
	start := len(e.out)
	out, err := e.rules.Open(e.out, p.key, stored)
	if err != nil {
		return err
	}
	e.out = out
	e.finish(p, f, start)
	return nil
}

// seal encrypts the value of a pair, if a rule covers its key.
func (e *editor) seal(p *pair) error {
	if !e.rules.Covers(p.key) {
		return nil
	}
	value, at, was := e.stored(p), e.at, len(e.out)
	if e.out == nil {
		e.out = make([]byte, 0, len(e.src)+headroom)
	}
	f := e.begin(p)
	start := len(e.out)
	out, err := e.rules.Seal(e.out, p.key, value)
	if err != nil {
		return err
	}
	if out == nil { // it stays as it is
		e.at, e.out = at, e.out[:was]
		return nil
	}
	e.out = out
	e.finish(p, f, start)
	return nil
}

// replace replaces the value of a pair by one byte.
func (e *editor) replace(p *pair) {
	e.out = slices.Grow(e.out, len(e.src))
	f := e.begin(p)
	e.out = append(e.out, 0)
	e.finish(p, f, len(e.out)-1)
}
