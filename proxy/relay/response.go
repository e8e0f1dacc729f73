package relay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"strconv"

	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
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
	parts  rpc.Parts              // what is buffered
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
	a.parts.Free()
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
		if rest, wouldBlock := a.splitMessages(m, p.data); wouldBlock {
			p.data = bytes.Clone(rest)
			st.detach(&st.responses, func(m etcdapi.Mode) { a.carryData(m, p) })
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
// others when they are whole, or a part of theirs is. If that would block, rest is what it has not
// handled of data.
func (a *responseMessages) splitMessages(m etcdapi.Mode, data []byte) (rest []byte, wouldBlock bool) {
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
			var err error
			n, err = a.parts.Take(data[:n], func(dst, part []byte) ([]byte, error) {
				if !a.scans {
					return append(dst, part...), nil
				}
				return st.call.Response(m, dst, part)
			})
			a.left -= n
			switch {
			case errors.Is(err, etcdapi.ErrWouldBlock):
				return data[n:], true
			case err != nil:
				a.parts.Free()
				st.fail(err)
			case a.left == 0:
				a.deliver()
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
	return nil, false
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
	if a.edits = a.scans || a.left > 0 && a.splits(); a.edits {
		a.parts.Begin(a.left, !a.scans || !st.call.Parts())
	} else {
		a.unsent = a.head
	}
}

// copied is the length in bytes up to which a response is copied into the pending bytes. The
// buffers of a longer one are kept until the client takes them.
const copied = 32 << 10

// deliver hands a message on that was inspected.
func (a *responseMessages) deliver() {
	st := a.stream
	msg, single := a.parts.Single()
	if a.splits() { // of a call whose responses do not come in parts
		all, err := st.call.(etcdapi.Splitter).Split(msg)
		if err != nil || len(all) > 0 {
			a.parts.Free()
		}
		if err != nil {
			st.fail(err)
			return
		}
		for i, msg := range all {
			st.client.Data(false, rpc.Header(len(msg)), msg)
			if i > 0 {
				st.method.Metrics.Sent.Inc()
			}
		}
		if len(all) > 0 {
			return
		}
	}
	if single && len(msg) <= copied {
		st.client.Data(false, rpc.Header(len(msg)), msg)
		a.parts.Free()
		return
	}
	made := a.parts.Result()
	st.client.Buffers(false, rpc.Header(made.Len()), made)
}

// splits reports whether the call must see whole responses, to split them.
func (a *responseMessages) splits() bool {
	x, ok := a.stream.call.(etcdapi.Splitter)
	return ok && x.Splits()
}
