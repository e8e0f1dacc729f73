package proxy

import (
	"bytes"
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"

	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// fstream is one stream of a client's: a call that is relayed, for which it has a stream to etcd, or
// one that a streamHandler serves.
//
// What comes from the client is handled on the goroutine that reads the client's connection, and what comes from etcd on the one that reads etcd's. Where a value can
// only be sealed or opened with the KMS, a goroutine of its own does that direction of the call from there on, until it has caught up: nobody else waits.
type fstream struct {
	session      *session
	method       *method // nil for what is no call of a method
	call         call    // nil if the method's messages are not looked into
	client       *http2conn.Stream
	fields       []hpack.HeaderField // the client's
	responseType string
	answers      answers     // what comes back
	asked        []byte      // what the client has sent, with gRPC's heads, and was not sent on
	asks         bool        // the one message of a call has come, and was sent on or will be
	admission    uint8       // under the mu of the session's admission
	ended        atomic.Bool // the client was told the end, or has left

	watch stopwatch // of a unary call: the time that it spends here

	heldIn, heldOut atomic.Int64 // bytes from the client and from etcd that have not been sent on

	mu              sync.Mutex
	served          streamHandler     // nil for a relayed call
	begun           bool              // the client was sent the header of the answer
	up              *http2conn.Stream // where it goes on to; nil before it does
	inward, outward parking
}

// streamHandler serves a stream on a goroutine of its own. Its methods do not block.
type streamHandler interface {
	// data takes what the client sends.
	data(data []byte, end bool)
	// sentAll says that nothing waits for the client's windows any more.
	sentAll()
	// left says that the client has reset the stream, or its connection has ended.
	left()
}

// handler returns what serves the stream, and nil for a relayed call.
func (st *fstream) handler() streamHandler {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.served
}

// moveTo has h serve the stream from now on, unless it has ended.
func (st *fstream) moveTo(h streamHandler) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.ended.Load() {
		return false
	}
	st.served = h
	return true
}

// begin is the client's headers.
func (st *fstream) begin(end bool) {
	if st.method.waits && st.session.engine.leaving.Load() {
		st.fail(errShuttingDown)
		return
	}
	st.call = st.method.newCall(st.session.id)
	if st.method.shape == shapeBidiStream {
		if ok, wouldBlock := st.connect(nonBlocking); wouldBlock {
			st.park(&st.inward, func(m mode) {
				if ok, _ := st.connect(m); !ok {
					st.handOver(nil, false)
				}
			})
		} else if !ok {
			st.handOver(nil, false)
		}
	}
	if end {
		st.in(nil, true)
	}
}

// in is what the client sends.
func (st *fstream) in(data []byte, end bool) {
	st.mu.Lock()
	if st.inward.parked {
		if len(st.inward.backlog) == 0 {
			st.inward.backlog = append(st.inward.backlog, piece{})
		}
		all := &st.inward.backlog[0] // one, since what makes a frame is not in the client's window
		all.data, all.end = append(all.data, data...), end
		st.mu.Unlock()
		return
	}
	st.mu.Unlock()
	st.request(nonBlocking, data, end)
}

// handOver has the method's handler serve a call that cannot be relayed. raw is what the client has
// sent so far.
func (st *fstream) handOver(raw []byte, end bool) {
	h := readHead(st.fields)
	st.heldIn.Store(0) // the handler's input gives it back
	st.handle(&h, bytes.Clone(raw), end)
}

// request handles what the client sends. Where it may not wait it may park the direction, and else it is done when it returns.
func (st *fstream) request(m mode, data []byte, end bool) {
	h := st.handler()
	switch {
	case st.ended.Load():
		st.client.Consumed(len(data))
	case h != nil:
		h.data(data, end)
	case st.method.shape == shapeBidiStream:
		st.messages(data, end)
	case st.asks: // what else comes is ignored, and gets no credit
	default:
		st.heldIn.Add(int64(len(data)))
		st.unary(m, data, end)
	}
}

// creditClient and creditUp give back what was held, once nothing of it waits any more.
func (st *fstream) creditClient() {
	if n := st.heldIn.Swap(0); n > 0 {
		st.client.Consumed(int(n))
	}
}

func (st *fstream) creditUp() {
	n := st.heldOut.Swap(0)
	st.mu.Lock()
	up := st.up
	st.mu.Unlock()
	if n > 0 && up != nil {
		up.Consumed(int(n))
	}
}

// unary gathers the one message of a call and sends it on when it is whole. Like etcd, a unary call
// does not wait for the client to half-close the stream, and ignores what comes after its message; a
// call whose answer is a stream waits. The handler answers a request that is not just one message.
func (st *fstream) unary(m mode, data []byte, end bool) {
	raw := data
	if len(st.asked) > 0 {
		st.asked = append(st.asked, data...)
		raw = st.asked
	}
	n, odd := -1, false // of the head and the message
	if len(raw) >= headLength {
		n = headLength + st.length(raw)
		odd = checkMessage(raw[0], n-headLength, st.session.engine.maxMessage, false) != nil
	}
	isUnary := st.method.shape == shapeUnary
	switch {
	case odd:
		st.handOver(raw, end)
	case n >= 0 && len(raw) >= n && isUnary, len(raw) == n && end:
		st.asks = true
		if !isUnary || st.session.admission.admit(st, raw[:n]) {
			st.forward(m, raw[:n])
		}
	case end, n >= 0 && len(raw) > n:
		st.handOver(raw, end)
	default:
		st.keep(raw, n)
	}
}

// keep keeps the front of a message of n bytes until the rest has come. n is negative as long as it is
// not known. The flow-control window opens for the rest when the limits permit.
func (st *fstream) keep(raw []byte, n int) {
	if n > cap(st.asked) {
		st.asked = append(make([]byte, 0, n), raw...)
		st.client.Expect(n - len(raw))
	} else if len(st.asked) == 0 {
		st.asked = append(st.asked, raw...)
	}
}

// length is that of the message at the front of raw.
func (*fstream) length(raw []byte) int {
	return int(binary.BigEndian.Uint32(raw[1:headLength]))
}

// forward sends a whole request on.
func (st *fstream) forward(m mode, raw []byte) {
	msg := raw[headLength:]
	edited := msg
	if st.call != nil {
		var err error
		if edited, err = st.call.request(m, msg); errors.Is(err, ErrWouldBlock) {
			raw = bytes.Clone(raw)
			st.park(&st.inward, func(m mode) { st.forward(m, raw) })
			return
		} else if err != nil {
			st.method.metrics.received.Inc()
			st.fail(err)
			return
		}
		if x, ok := st.call.(exchanger); ok && x.exchanges() {
			st.handOver(raw, true)
			return
		}
	}
	ok, wouldBlock := st.connect(m)
	switch {
	case wouldBlock:
		raw = bytes.Clone(raw)
		st.park(&st.inward, func(m mode) { st.forward(m, raw) })
		return
	case !ok:
		st.handOver(raw, true)
		return
	}
	if st.up == nil { // the client has left meanwhile
		return
	}
	st.method.metrics.received.Inc()
	st.watch.stop()
	if st.up.Data(true, head(len(edited)), edited) {
		st.creditClient()
	}
	st.asked = nil
}

// messages sends on what is whole of a stream of messages.
func (st *fstream) messages(data []byte, end bool) {
	raw := data
	if len(st.asked) > 0 {
		st.asked = append(st.asked, data...)
		raw = st.asked
	}
	st.heldIn.Add(int64(len(data)))
	all, begun := true, len(raw)
	for len(raw) >= headLength {
		n := st.length(raw)
		if err := checkMessage(raw[0], n, st.session.engine.maxMessage, false); err != nil {
			st.fail(err)
			return
		}
		if len(raw) < headLength+n {
			break
		}
		msg := raw[headLength : headLength+n]
		raw = raw[headLength+n:]
		st.method.metrics.received.Inc()
		if st.call != nil {
			var err error
			// No request of a stream carries a value, so none waits for the KMS.
			if msg, err = st.call.request(nonBlocking, msg); err != nil {
				st.fail(err)
				return
			}
		}
		all = st.up.Data(end && len(raw) == 0, head(len(msg)), msg)
		if end && len(raw) == 0 {
			end = false
		}
	}
	if end && len(raw) >= headLength { // grpc-go passes over a head that is cut off
		st.fail(errCutMessage)
		return
	}
	if len(raw) < begun { // else it is what was kept before
		st.asked = nil
	}
	n := -1
	if len(raw) >= headLength {
		n = headLength + st.length(raw)
	}
	st.keep(raw, n)
	if end {
		all = st.up.Data(true, nil, nil)
	}
	if len(raw) == 0 && all && !st.up.HasQueued() {
		st.creditClient()
	}
}
