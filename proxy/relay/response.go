package relay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strconv"

	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/mem"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// upstreamData is one piece of a response: header fields, or data.
type upstreamData struct {
	stream *http2conn.Stream // the stream to etcd
	fields []hpack.HeaderField
	data   []byte
	end    bool
}

// responseMessages is the state of the response messages of a call. Only the goroutine that has the
// direction uses it, see [clientStream].
type responseMessages struct {
	stream *clientStream
	head   []byte                 // of the message, as far as it has arrived
	header [rpc.HeaderLength]byte // that head is a part of
	unsent []byte                 // the head, if the message passes and nothing of it was sent
	left   int                    // bytes of the message that have not arrived
	scans  bool                   // its values are decrypted
	edits  bool                   // it is buffered: to be rewritten, split or sent as a whole
	own    *[]byte                // the buffered part, from rpc.Buffers
	n      int                    // bytes in own
	parts  mem.BufferSlice        // the rewritten parts
}

// fromUpstream takes what etcd sends.
func (st *clientStream) fromUpstream(p upstreamData) {
	st.watch.Start()
	if st.responses.detached.Load() {
		st.mu.Lock()
		detached := st.responses.detached.Load()
		if detached {
			p.data = bytes.Clone(p.data)
			st.responses.backlog = append(st.responses.backlog, p)
		}
		st.mu.Unlock()
		if detached {
			return
		}
	}
	st.response.receive(etcdapi.NonBlocking, p)
}

// receive handles what etcd sends. In non-blocking mode it may detach the direction.
func (a *responseMessages) receive(m etcdapi.Mode, p upstreamData) {
	st := a.stream
	if p.fields == nil {
		st.heldFromUpstream.Add(int64(len(p.data)))
		a.carryData(m, p)
		return
	}
	st.session.admission.release(st)
	if !p.end {
		st.mu.Lock()
		defer st.mu.Unlock()
		if !st.ended.Load() { // or what ends it has been sent, or will be
			st.begun = true
			st.client.Headers(p.fields, false)
		}
		return
	}
	finished := st.finish(codeOf(p.fields))
	if finished {
		st.client.Headers(p.fields, true)
		st.watch.Observe(st.method.Metrics.Added)
	}
	a.free()
	p.stream.Finish()
	if finished {
		st.session.memory.put(st)
	}
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

// carryData moves data towards the client.
func (a *responseMessages) carryData(m etcdapi.Mode, p upstreamData) {
	st := a.stream
	if !st.ended.Load() {
		if rest, blocked := a.splitMessages(m, p.data); blocked != nil {
			p.data = bytes.Clone(rest)
			st.detach(&st.responses, func(m etcdapi.Mode) {
				// it does not block any more
				_ = a.rewrite(etcdapi.Mode{Ctx: m.Ctx, Blocked: blocked})
				a.messageEnd()
				a.carryData(m, p)
			})
			return
		}
	}
	if !st.client.HasQueued() {
		st.consumedFromUpstream()
	}
	if p.end { // without a trailer, which a server of gRPC does not do
		if st.finish(codes.Unknown) {
			st.client.Data(true, nil, nil)
		}
		p.stream.Finish()
	}
}

// splitMessages finds the messages in data, passes those that are not rewritten, and rewrites the
// others when they are whole, or a part of theirs is. If that would block it returns how far it
// came, and rest is what follows in data.
func (a *responseMessages) splitMessages(m etcdapi.Mode, data []byte) (rest []byte, blocked *etcdwire.Blocked) {
	st := a.stream
	for len(data) > 0 && !st.ended.Load() {
		if len(a.head) < rpc.HeaderLength {
			n := min(rpc.HeaderLength-len(a.head), len(data))
			if a.head == nil {
				a.head = a.header[:0]
			}
			a.head = append(a.head, data[:n]...)
			if data = data[n:]; len(a.head) < rpc.HeaderLength {
				break
			}
			if a.message(); st.ended.Load() {
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
			if blocked := a.rewrite(m); blocked != nil {
				return data[n:], blocked
			}
		case n > 0 || a.left == 0:
			a.left -= n
			if partial := a.left > 0; partial != st.partial.Load() {
				st.partial.Store(partial)
			}
			st.client.Data(false, a.unsent, data[:n])
			a.unsent = nil
		}
		data = data[n:]
		a.messageEnd()
	}
	return nil, nil
}

// messageEnd starts again after a whole message.
func (a *responseMessages) messageEnd() {
	st := a.stream
	if a.left == 0 {
		st.method.Metrics.Sent.Inc()
		a.head = a.head[:0]
	}
}

// message begins with the message whose head has arrived. A message that is not inspected is passed
// as it arrives.
func (a *responseMessages) message() {
	st := a.stream
	if a.head[0] != 0 {
		st.fail(rpc.Error(codes.Internal, "etcd has compressed a response, which was not requested"))
		return
	}
	a.left = int(binary.BigEndian.Uint32(a.head[1:]))
	a.scans = st.call != nil && a.left > 0 && st.call.Scans()
	if a.edits = a.scans || a.left > 0 && st.splits(); a.edits {
		a.own, a.n = rpc.Buffers.Get(min(a.left, rpc.PartSize)), 0
	} else {
		a.unsent = a.head
	}
}

// rewrite rewrites what has arrived of a message, and hands it on when that is all. If that would
// block it returns how far it came, and is to be called again with that.
func (a *responseMessages) rewrite(m etcdapi.Mode) *etcdwire.Blocked {
	st := a.stream
	own, n, whole := a.own, a.n, a.n
	if a.left > 0 {
		next := 0
		switch {
		case !a.scans: // it is not inspected before it is put together again
		case !st.call.Parts():
			whole = 0
		default:
			if whole, next = etcdwire.WholeFields((*own)[:n]); next < 0 {
				whole = n // what is wrong with it is for the call to say
			}
		}
		if whole == 0 {
			a.own = rpc.Buffers.Get(min(max(2*n, next), n+a.left))
			copy(*a.own, (*own)[:n])
			rpc.Buffers.Put(own)
			return nil
		}
	}
	out := (*own)[:whole:whole]
	if a.scans {
		var err error
		if out, err = st.call.Response(m, out); err != nil {
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
		a.own = rpc.Buffers.Get(min(max(rpc.PartSize, len(begun)+1), len(begun)+a.left))
		a.n = copy(*a.own, begun)
	}
	if a.left == 0 && len(a.parts) == 0 && len(out) <= copied && !a.stream.splits() {
		a.stream.client.Data(false, rpc.Header(len(out)), out)
		rpc.Buffers.Put(own)
		return nil
	}
	if a.parts = append(a.parts, rpc.BufferOf(own, out)); a.left == 0 {
		a.deliver()
	}
	return nil
}

// copied is the length in bytes up to which a response is copied into the pending bytes. The
// buffers of a longer one are kept until the client takes them.
const copied = 32 << 10

// deliver hands a message on that was inspected.
func (a *responseMessages) deliver() {
	st := a.stream
	made := a.parts
	a.parts = nil
	if st.splits() {
		all, err := st.call.(etcdapi.Splitter).Split(made.Materialize())
		if err != nil {
			made.Free()
			st.fail(err)
			return
		}
		if len(all) > 0 {
			made.Free()
			for i, msg := range all {
				st.client.Data(false, rpc.Header(len(msg)), msg)
				if i > 0 {
					st.method.Metrics.Sent.Inc()
				}
			}
			return
		}
	}
	if n := made.Len(); len(made) > 1 || n > copied {
		st.client.Buffers(false, rpc.Header(n), made)
		return
	}
	st.client.Data(false, rpc.Header(made.Len()), made[0].ReadOnlyData())
	made.Free()
}

// splits reports whether the call must see whole responses, to split them.
func (st *clientStream) splits() bool {
	x, ok := st.call.(etcdapi.Splitter)
	return ok && x.Splits()
}

// drop gives back what was gathered.
func (a *responseMessages) drop() {
	if a.own != nil {
		rpc.Buffers.Put(a.own)
		a.own, a.n = nil, 0
	}
}

// free gives everything back.
func (a *responseMessages) free() {
	a.drop()
	a.parts.Free()
	a.parts = nil
}
