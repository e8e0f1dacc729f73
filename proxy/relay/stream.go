package relay

import (
	"bytes"
	"encoding/binary"
	"errors"
	"sync"
	"sync/atomic"

	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/metrics"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// clientStream is one stream of a client: a relayed call, for which it has a stream to etcd, or a
// stream that a streamHandler serves.
//
// The goroutine that reads the client's connection handles requests, and the goroutine that reads
// etcd's connection handles responses. If a value needs the KMS, the direction is detached: a
// goroutine of its own handles it from then on, until it has caught up. No other call waits.
type clientStream struct {
	session *session
	method  *etcdapi.Method // nil for a web request and for an unknown method
	call    etcdapi.Call    // nil if the method's messages pass unchanged
	client  *http2conn.Stream
	// the memory of client, up and call: one object for a call, which other calls use after it
	clientMemory, upMemory http2conn.Stream
	callMemory             etcdapi.CallMemory
	fields                 []hpack.HeaderField // the client's
	// what was made of fields; nil if the client has not repeated them
	repeated     *repeatedHeader
	responseType string
	timeout      string           // the value of grpc-timeout; "" for none
	response     responseMessages // what comes back
	// what the client has sent, with gRPC's message headers, and was not forwarded
	pending []byte
	// the only message of a call has arrived, and was or will be forwarded
	forwarded bool
	admission atomic.Uint32 // its state in the session's admission
	ended     atomic.Bool   // the end was sent to the client, or the client has left
	handled   atomic.Bool   // served is not nil
	// it was relayed and waits for events; a drain on another goroutine may read method then
	indefinite atomic.Bool

	// the client was sent a part of a message, and not the rest
	partial atomic.Bool
	// others than the goroutines that read the two connections may refer to it
	shared atomic.Bool

	watch metrics.Stopwatch // of a unary call: the time that it spends here

	// bytes from the client and from etcd that have not been sent on
	heldFromClient, heldFromUpstream atomic.Int64

	mu                  sync.Mutex
	served              streamHandler     // nil for a relayed call
	begun               bool              // the client was sent the header of the response
	up                  *http2conn.Stream // to etcd; nil before the call is forwarded
	requests, responses direction
}

// streamHandler serves a stream on a goroutine of its own. Its methods do not block.
type streamHandler interface {
	// data takes what the client sends.
	data(data []byte, end bool)
	// drained is called when all queued data was written.
	drained()
	// clientGone is called when the client has reset the stream, or its connection has ended.
	clientGone()
}

// handler returns what serves the stream, and nil for a relayed call.
func (st *clientStream) handler() streamHandler {
	if !st.handled.Load() {
		return nil
	}
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.served
}

// moveTo has h serve the stream from now on, unless it has ended.
func (st *clientStream) moveTo(h streamHandler) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.ended.Load() {
		return false
	}
	st.served = h
	st.shared.Store(true)
	st.handled.Store(true)
	return true
}

// begin is the client's headers.
func (st *clientStream) begin(end bool) {
	if st.method.Indefinite {
		st.indefinite.Store(true) // before the load: a drain sees the one or this the other
		if st.session.engine.draining.Load() {
			st.fail(etcdapi.ErrShuttingDown)
			return
		}
	}
	st.call = st.method.NewCall(st.session.id, &st.callMemory)
	if st.method.Shape == etcdapi.ShapeBidiStream {
		if ok, wouldBlock := st.connect(etcdapi.NonBlocking, nil); wouldBlock {
			st.detach(&st.requests, func(m etcdapi.Mode) {
				if ok, _ := st.connect(m, nil); !ok {
					st.toHandler(nil, false)
				}
			})
		} else if !ok {
			st.toHandler(nil, false)
		}
	}
	if end {
		st.fromClient(nil, true)
	}
}

// fromClient is what the client sends.
func (st *clientStream) fromClient(data []byte, end bool) {
	if st.requests.detached.Load() && st.backlogged(data, end) {
		return
	}
	st.request(etcdapi.NonBlocking, data, end)
}

// backlogged adds what the client sends to the backlog, if the direction is still detached.
func (st *clientStream) backlogged(data []byte, end bool) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	if !st.requests.detached.Load() {
		return false
	}
	if len(st.requests.backlog) == 0 {
		st.requests.backlog = append(st.requests.backlog, upstreamData{})
	}
	// one, since what makes a frame is not in the client's window
	all := &st.requests.backlog[0]
	all.data, all.end = append(all.data, data...), end
	return true
}

// toHandler has the method's handler serve a call that cannot be relayed. raw is what the client
// has sent so far.
func (st *clientStream) toHandler(raw []byte, end bool) {
	h := readRequestHead(st.fields)
	st.heldFromClient.Store(0) // the handler's input gives it back
	handle(st, &h, bytes.Clone(raw), end)
}

// request handles what the client sends. In non-blocking mode it may detach the direction.
func (st *clientStream) request(m etcdapi.Mode, data []byte, end bool) {
	h := st.handler()
	switch {
	case st.ended.Load():
		st.client.Consumed(len(data))
	case h != nil:
		h.data(data, end)
	case st.method.Shape == etcdapi.ShapeBidiStream:
		st.messages(data, end)
	case st.forwarded: // what follows is ignored, and stays in the flow-control window
	default:
		st.heldFromClient.Add(int64(len(data)))
		st.unary(m, data, end)
	}
}

// consumedFromClient and consumedFromUpstream return what was held to the flow-control window.
func (st *clientStream) consumedFromClient() {
	if n := st.heldFromClient.Swap(0); n > 0 {
		st.client.Consumed(int(n))
	}
}

func (st *clientStream) consumedFromUpstream() {
	n := st.heldFromUpstream.Swap(0)
	st.mu.Lock()
	up := st.up
	st.mu.Unlock()
	if n > 0 && up != nil {
		up.Consumed(int(n))
	}
}

// unary gathers the one message of a call and sends it on when it is whole. Like etcd, a unary call
// does not wait for the client to half-close the stream, and ignores what comes after its message;
// a call whose response is a stream waits. The handler serves a request that is not just
// one message.
func (st *clientStream) unary(m etcdapi.Mode, data []byte, end bool) {
	raw := data
	if len(st.pending) > 0 {
		st.pending = append(st.pending, data...)
		raw = st.pending
	}
	n, unsupported := -1, false // of the head and the message
	if len(raw) >= rpc.HeaderLength {
		n = rpc.HeaderLength + messageLength(raw)
		unsupported = rpc.CheckMessage(raw[0], n-rpc.HeaderLength, st.session.engine.maxMessage, false) != nil
	}
	isUnary := st.method.Shape == etcdapi.ShapeUnary
	switch {
	case unsupported:
		st.toHandler(raw, end)
	case n >= 0 && len(raw) >= n && isUnary, len(raw) == n && end:
		st.forwarded = true
		if !isUnary || st.session.admission.admit(st, raw[:n]) {
			st.forward(m, raw[:n])
		}
	case end, n >= 0 && len(raw) > n:
		st.toHandler(raw, end)
	default:
		st.keep(raw, n)
	}
}

// keep keeps the front of a message of n bytes until the rest has arrived. n is negative as long as
// it is not known. The flow-control window opens for the rest when the limits permit.
func (st *clientStream) keep(raw []byte, n int) {
	if n > cap(st.pending) {
		st.pending = append(make([]byte, 0, n), raw...)
		st.client.Expect(n - len(raw))
	} else if len(st.pending) == 0 {
		st.pending = append(st.pending, raw...)
	}
}

// messageLength is that of the message at the front of raw.
func messageLength(raw []byte) int {
	return int(binary.BigEndian.Uint32(raw[1:rpc.HeaderLength]))
}

// forward sends a whole request on.
func (st *clientStream) forward(m etcdapi.Mode, raw []byte) {
	msg := raw[rpc.HeaderLength:]
	edited := msg
	if st.call != nil {
		var err error
		if edited, err = st.call.Request(m, msg); errors.Is(err, etcdapi.ErrWouldBlock) {
			st.forwardLater(raw)
			return
		} else if err != nil {
			st.method.Metrics.Received.Inc()
			st.fail(err)
			return
		}
		if x, ok := st.call.(etcdapi.Exchanger); ok && x.Exchanges() {
			st.toHandler(raw, true)
			return
		}
	}
	st.watch.Stop()
	memory := st.callMemory.TakeRequest() // the response may end this call before connect returns
	ok, wouldBlock := st.connect(m, &unaryRequest{rpc.Header(len(edited)), edited})
	if memory != nil {
		rpc.Buffers.Put(memory)
	}
	switch {
	case wouldBlock:
		st.forwardLater(raw)
		return
	case !ok:
		st.toHandler(raw, true)
		return
	}
	st.pending = nil
}

// forwardLater has another goroutine forward a request, which it copies.
func (st *clientStream) forwardLater(raw []byte) {
	raw = bytes.Clone(raw)
	st.detach(&st.requests, func(m etcdapi.Mode) { st.forward(m, raw) })
}

// messages sends on what is whole of a stream of messages.
func (st *clientStream) messages(data []byte, end bool) {
	raw := data
	if len(st.pending) > 0 {
		st.pending = append(st.pending, data...)
		raw = st.pending
	}
	st.heldFromClient.Add(int64(len(data)))
	all, begun := true, len(raw)
	for len(raw) >= rpc.HeaderLength {
		n := messageLength(raw)
		if err := rpc.CheckMessage(raw[0], n, st.session.engine.maxMessage, false); err != nil {
			st.fail(err)
			return
		}
		if len(raw) < rpc.HeaderLength+n {
			break
		}
		msg := raw[rpc.HeaderLength : rpc.HeaderLength+n]
		raw = raw[rpc.HeaderLength+n:]
		st.method.Metrics.Received.Inc()
		if st.call != nil {
			var err error
			// No request of a stream carries a value, so none waits for the KMS.
			if msg, err = st.call.Request(etcdapi.NonBlocking, msg); err != nil {
				st.fail(err)
				return
			}
		}
		all = st.up.Data(end && len(raw) == 0, rpc.Header(len(msg)), msg)
		if end && len(raw) == 0 {
			end = false
		}
	}
	if end && len(raw) >= rpc.HeaderLength { // grpc-go passes over a head that is cut off
		st.fail(errCutMessage)
		return
	}
	if len(raw) < begun { // else it is what was kept before
		st.pending = nil
	}
	n := -1
	if len(raw) >= rpc.HeaderLength {
		n = rpc.HeaderLength + messageLength(raw)
	}
	st.keep(raw, n)
	if end {
		all = st.up.Data(true, nil, nil)
	}
	if len(raw) == 0 && all && !st.up.HasQueued() {
		st.consumedFromClient()
	}
}
