package rpc

import (
	"google.golang.org/grpc/mem"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

// PartSize is how many bytes of a long message are in one buffer, unless a field is longer.
const PartSize = 64 << 10

// Parts rewrites one message while it arrives. Protobuf's messages can be cut between two fields
// and put together again, so that it can do so in parts, each of whole fields. It reads a part
// where the caller has it, and keeps only the front of a field whose rest has not arrived. The
// result is in buffers of [Buffers].
type Parts struct {
	left    int     // bytes of the message that were not taken
	whole   bool    // the message is one part
	partial *[]byte // the front of a part; or nil
	have    int     // bytes in partial
	out     *[]byte // the last buffer of the result; or nil
	n       int     // bytes in out
	done    mem.BufferSlice
}

// Rewrite appends to dst, which has room for as many bytes as part has, what replaces a part of a
// message.
type Rewrite func(dst, part []byte) ([]byte, error)

// Begin begins with a message of n bytes. If whole is true, it is rewritten as one part.
func (p *Parts) Begin(n int, whole bool) { *p = Parts{left: n, whole: whole} }

// Take takes the next bytes of the message and returns how many: all, up to the end of the message,
// unless rewrite returns an error. It can then be called again with those that it has not taken.
func (p *Parts) Take(data []byte, rewrite Rewrite) (taken int, err error) {
	for data = data[:min(len(data), p.left)]; taken < len(data); {
		n := 0
		if p.partial == nil {
			n, err = p.next(data[taken:], rewrite)
		} else {
			n, err = p.complete(data[taken:], rewrite)
		}
		if err != nil {
			return taken, err
		}
		taken += n
		p.left -= n
	}
	return taken, nil
}

// next takes the next part from data, or its front.
func (p *Parts) next(data []byte, rewrite Rewrite) (int, error) {
	last := len(data) == p.left
	n, length := len(data), 0 // of the part: what data has of it, and all
	switch {
	case last && (p.whole || n <= PartSize):
	case p.whole:
		n, length = 0, min(max(2*n, PartSize), p.left)
	default:
		room := PartSize
		if p.out != nil {
			room = len(*p.out) - p.n
		}
		n, length = etcdwire.WholeFields(data[:min(room, len(data))])
		switch {
		case length < 0, n == 0 && last && length > len(data):
			n = len(data) // what is wrong with it is for rewrite to say
		case n == 0 && p.out != nil && room < len(data):
			p.finish()
			return 0, nil
		case n == 0 && length > 0 && length <= len(data):
			n = length // a field that is longer than a buffer
		}
	}
	if n > 0 {
		return n, p.add(data[:n], rewrite)
	}
	p.partial = Buffers.Get(max(length, len(data), minPooled))
	p.have = copy(*p.partial, data)
	return p.have, nil
}

// complete takes what is left of the part that has begun.
func (p *Parts) complete(data []byte, rewrite Rewrite) (int, error) {
	want, length := p.left, 2*p.have
	if !p.whole {
		if _, length = etcdwire.WholeFields((*p.partial)[:p.have]); length > 0 {
			want = min(length-p.have, p.left)
		} else { // its tag or its length is cut
			want, length = 1, p.have+1
		}
	}
	if length > len(*p.partial) && p.have+min(want, len(data)) > len(*p.partial) {
		longer := Buffers.Get(max(min(length, p.have+p.left), p.have+min(want, len(data))))
		copy(*longer, (*p.partial)[:p.have])
		Buffers.Put(p.partial)
		p.partial = longer
	}
	n := copy((*p.partial)[p.have:], data[:min(want, len(data))])
	part := (*p.partial)[:p.have+n]
	if n < p.left {
		whole, length := 0, 0
		if !p.whole {
			whole, length = etcdwire.WholeFields(part)
		}
		if whole < len(part) && length >= 0 {
			p.have += n
			return n, nil
		}
	}
	if err := p.add(part, rewrite); err != nil {
		return 0, err
	}
	Buffers.Put(p.partial)
	p.partial, p.have = nil, 0
	return n, nil
}

// add adds what replaces a part to the result.
func (p *Parts) add(part []byte, rewrite Rewrite) error {
	if p.out != nil && len(*p.out)-p.n < len(part) {
		p.finish()
	}
	if p.out == nil {
		p.out = Buffers.Get(max(len(part), min(PartSize, p.have+p.left), minPooled))
	}
	out, err := rewrite((*p.out)[:p.n:len(*p.out)], part)
	if err != nil {
		return err
	}
	if len(out) > len(*p.out) { // it did not have the room
		Buffers.Put(p.out)
		longer := out
		p.out = &longer
	}
	p.n = len(out)
	return nil
}

// finish adds out to what is done.
func (p *Parts) finish() {
	whole := mem.NewBuffer(p.out, Buffers)
	p.done = append(p.done, whole.Slice(0, p.n))
	whole.Free() // the whole goes back to the pool, to be cleared, when its front was sent
	p.out, p.n = nil, 0
}

// Single returns the result if it is in one buffer, until Free is called.
func (p *Parts) Single() (msg []byte, ok bool) {
	if len(p.done) > 0 || p.out == nil {
		return nil, false
	}
	return (*p.out)[:p.n], true
}

// Result hands the result over.
func (p *Parts) Result() mem.BufferSlice {
	if p.out != nil {
		p.finish()
	}
	done := p.done
	p.done = nil
	return done
}

// Free gives back all buffers.
func (p *Parts) Free() {
	for _, b := range []**[]byte{&p.partial, &p.out} {
		if *b != nil {
			Buffers.Put(*b)
			*b = nil
		}
	}
	p.done.Free()
	p.done = nil
}
