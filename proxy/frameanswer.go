package proxy

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strconv"

	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// piece is what comes in at once: header fields, or data.
type piece struct {
	stream *http2conn.Stream // of etcd's, that it came on
	fields []hpack.HeaderField
	data   []byte
	end    bool
}

// answers is how far a call's answers have come. It is of whoever has the direction, see [fstream].
type answers struct {
	head   []byte          // of the message, as far as it has come
	unsent []byte          // the head, if the message passes and nothing of it was sent
	left   int             // bytes of the message that have not come
	scans  bool            // its values are opened
	edits  bool            // it is gathered for that, to be cut, or to be whole
	own    *[]byte         // what is to be looked into next; of buffers
	n      int             // bytes in own
	made   mem.BufferSlice // what was made of the parts before
}

// out is what etcd sends.
func (st *fstream) out(p piece) {
	st.watch.start()
	st.mu.Lock()
	if st.outward.parked {
		p.data = bytes.Clone(p.data)
		st.outward.backlog = append(st.outward.backlog, p)
		st.mu.Unlock()
		return
	}
	st.mu.Unlock()
	st.answer(nonBlocking, p)
}

// answer handles what etcd sends. Where it may not wait it may park the direction, and else it is done when it returns.
func (st *fstream) answer(m mode, p piece) {
	if p.fields == nil {
		st.heldOut.Add(int64(len(p.data)))
		st.carry(m, p)
		return
	}
	st.session.admission.release(st)
	switch {
	case !p.end:
		st.mu.Lock()
		defer st.mu.Unlock()
		if !st.ended.Load() { // or what ends it has been sent, or will be
			st.begun = true
			st.client.Headers(p.fields, false)
		}
		return
	case st.finish(codeOf(p.fields)):
		st.client.Headers(p.fields, true)
		if st.method != nil {
			st.watch.observe(st.method.metrics.added)
		}
	}
	st.answers.free()
	p.stream.Finish()
}

// codeOf is the status in a trailer.
func codeOf(trailer []hpack.HeaderField) codes.Code {
	for _, f := range trailer {
		if f.Name == "grpc-status" {
			if n, err := strconv.ParseUint(f.Value, 10, 32); err == nil {
				return codes.Code(n)
			}
		}
	}
	return codes.Unknown
}

// carry moves data towards the client.
func (st *fstream) carry(m mode, p piece) {
	switch {
	case st.ended.Load():
	default:
		if rest, blocked := st.cut(m, p.data); blocked != nil {
			p.data = bytes.Clone(rest)
			st.park(&st.outward, func(m mode) {
				_ = st.look(mode{m.ctx, blocked}) // it does not block any more
				st.messageEnd()
				st.carry(m, p)
			})
			return
		}
	}
	if !st.client.HasQueued() {
		st.creditUp()
	}
	if p.end { // without a trailer, which a server of gRPC does not do
		if st.finish(codes.Unknown) {
			st.client.Data(true, nil, nil)
		}
		p.stream.Finish()
	}
}

// cut finds the messages in data, passes those that are not rewritten, and rewrites the others when they are whole, or a part of theirs is. If that would
// block it returns how far it came, and rest is what follows in data.
func (st *fstream) cut(m mode, data []byte) (rest []byte, blocked *etcdwire.Blocked) {
	a := &st.answers
	for len(data) > 0 && !st.ended.Load() {
		if len(a.head) < headLength {
			n := min(headLength-len(a.head), len(data))
			a.head = append(a.head, data[:n]...)
			if data = data[n:]; len(a.head) < headLength {
				break
			}
			if st.message(len(data)); st.ended.Load() {
				break
			}
		}
		n := min(a.left, len(data))
		switch {
		case a.edits:
			n = copy((*a.own)[a.n:], data[:n])
			a.n += n
			a.left -= n
			if a.left > 0 && a.n < len(*a.own) {
				return nil, nil
			}
			if blocked := st.look(m); blocked != nil {
				return data[n:], blocked
			}
		case n > 0 || a.left == 0:
			a.left -= n
			st.client.Data(false, a.unsent, data[:n])
			a.unsent = nil
		}
		data = data[n:]
		st.messageEnd()
	}
	return nil, nil
}

// messageEnd begins anew after a whole message.
func (st *fstream) messageEnd() {
	if st.answers.left == 0 {
		st.method.metrics.sent.Inc()
		st.answers.head = st.answers.head[:0]
	}
}

// message begins with the message whose head has come, with so many bytes after it. The answer of a unary call is gathered also where nobody looks into it: should etcd be lost in its
// midst, the client is to be told so. Once it has the front of a message it says Internal, whatever the status, and does not try again.
func (st *fstream) message(come int) {
	a := &st.answers
	if a.head[0] != 0 {
		st.fail(ownError(codes.Internal, "etcd's answer is compressed, which nobody asked for"))
		return
	}
	a.left = int(binary.BigEndian.Uint32(a.head[1:]))
	a.scans = st.call != nil && a.left > 0 && st.call.scans()
	x, ok := st.call.(cutter)
	if a.edits = a.scans || ok && a.left > 0 && x.cuts() || st.method.shape == shapeUnary && a.left > come; a.edits {
		a.own, a.n = buffers.Get(min(a.left, partSize)), 0
	} else {
		a.unsent = a.head
	}
}

// look rewrites what has come of a message, and hands it on when that is all. If that would block it returns how far it
// came, and is to be called again with that.
func (st *fstream) look(m mode) *etcdwire.Blocked {
	a := &st.answers
	own, n, whole := a.own, a.n, a.n
	if a.left > 0 {
		next := 0
		switch {
		case !a.scans: // nobody looks at it before it is put together again
		case !st.call.parts():
			whole = 0
		default:
			if whole, next = etcdwire.WholeFields((*own)[:n]); next < 0 {
				whole = n // what is wrong with it is for the call to say
			}
		}
		if whole == 0 {
			a.own = buffers.Get(min(max(2*n, next), n+a.left))
			copy(*a.own, (*own)[:n])
			buffers.Put(own)
			return nil
		}
	}
	out := (*own)[:whole:whole]
	if a.scans {
		var err error
		if out, err = st.call.response(m, out); err != nil {
			if blocked, ok := errors.AsType[*etcdwire.Blocked](err); ok {
				return blocked
			}
			a.drop()
			st.fail(err)
			return nil
		}
	}
	a.own, a.n = nil, 0
	if a.left > 0 {
		begun := (*own)[whole:n]
		a.own = buffers.Get(min(max(partSize, len(begun)+1), len(begun)+a.left))
		a.n = copy(*a.own, begun)
	}
	if a.made = append(a.made, bufferOf(own, out)); a.left == 0 {
		st.deliver()
	}
	return nil
}

// copied is up to what length an answer is copied into what is written next, in bytes. A longer one is kept until the client takes it.
const copied = 32 << 10

// deliver hands a message on that was looked into.
func (st *fstream) deliver() {
	made := st.answers.made
	st.answers.made = nil
	if x, ok := st.call.(cutter); ok && x.cuts() {
		all, err := x.cut(made.Materialize())
		if err != nil {
			made.Free()
			st.fail(err)
			return
		}
		if len(all) > 0 {
			made.Free()
			for i, msg := range all {
				st.client.Data(false, head(len(msg)), msg)
				if i > 0 {
					st.method.metrics.sent.Inc()
				}
			}
			return
		}
	}
	if n := made.Len(); len(made) > 1 || n > copied {
		st.client.Buffers(false, head(n), made)
		return
	}
	st.client.Data(false, head(made.Len()), made[0].ReadOnlyData())
	made.Free()
}

// drop gives back what was gathered.
func (a *answers) drop() {
	if a.own != nil {
		buffers.Put(a.own)
		a.own, a.n = nil, 0
	}
}

// free lets go of everything.
func (a *answers) free() {
	a.drop()
	a.made.Free()
	a.made = nil
}
