package proxy

import (
	"bytes"
	"context"
	"encoding/binary"
	"io"
	"sync"
	"sync/atomic"

	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// fstream is one call on its way through the frame engine: a stream of the client's and one that it goes on to.
//
// What comes from the client is handled on the goroutine that reads the client's connection, and what comes from etcd on the one that reads etcd's. Where a value can
// only be sealed or opened with the KMS, a goroutine of its own does that direction of the call from there on, until it has caught up: nobody else waits.
type fstream struct {
	session *session
	method  *grpcMethod // nil for what goes on to the reference engine
	call    call        // nil if the method's messages are not looked into
	client  *http2conn.Stream
	fields  []hpack.HeaderField // the client's, until they are sent on
	answers answers             // what comes back
	asked   []byte              // what the client has sent, with gRPC's heads, and was not sent on
	web     bool                // it goes on to the gateway
	asks    bool                // the one message of a call has come, and was sent on or will be
	silent  bool                // the client's headers were its last word, which is not the same as an end without a message
	ended   atomic.Bool         // the client was told the end, or has left

	watch stopwatch // of a unary call: the time that it spends here

	heldIn, heldOut atomic.Int64 // bytes from the client and from etcd that have not been sent on

	mu              sync.Mutex
	local           bool              // it goes on to the reference engine
	begun           bool              // the client was sent the header of the answer
	up              *http2conn.Stream // where it goes on to; nil before it does
	inward, outward parking
}

// headLength is that of the head of a gRPC message: a flag and four bytes of length.
const headLength = 5

// begin is the client's headers.
func (st *fstream) begin(end bool) {
	st.silent = end
	if st.method == nil {
		st.toReference(nil, end)
		return
	}
	if st.method.waits && st.session.engine.leaving.Load() {
		st.fail(errShuttingDown)
		return
	}
	st.call = st.method.newCall(st.session.id)
	if st.method.shape == shapeBidiStream {
		if ok, waits := st.connect(hasty); waits {
			st.park(&st.inward, func(ctx context.Context) {
				if ok, _ := st.connect(ctx); !ok {
					st.toReference(nil, false)
				}
			})
		} else if !ok {
			st.toReference(nil, false)
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
	st.request(hasty, data, end)
}

// request handles what the client sends. With a context that does not wait it may park the direction, and else it is done when it returns.
func (st *fstream) request(ctx context.Context, data []byte, end bool) {
	switch {
	case st.ended.Load():
		st.client.Consumed(len(data))
	case st.isLocal():
		st.pass(data, end)
	case st.method.shape == shapeBidiStream:
		st.messages(ctx, data, end)
	case st.asks: // what else comes is ignored, and gets no credit
	default:
		st.client.Consumed(len(data))
		st.unary(ctx, data, end)
	}
}

// pass sends data on as it is.
func (st *fstream) pass(data []byte, end bool) {
	st.heldIn.Add(int64(len(data)))
	if st.up.Data(end, nil, data) {
		st.creditClient()
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
// does not wait for the client to half-close the stream; a call whose answer is a stream does. What is
// not just one message is the reference engine's to judge, if it comes at once; what comes after the
// message of a unary call was sent on is ignored.
func (st *fstream) unary(ctx context.Context, data []byte, end bool) {
	raw := data
	if len(st.asked) > 0 {
		st.asked = append(st.asked, data...)
		raw = st.asked
	}
	n := -1 // of the head and the message
	if len(raw) >= headLength {
		n = headLength + st.length(raw)
	}
	odd := n >= 0 && (raw[0] != 0 || n > headLength+st.session.engine.core.maxRequest+grpcOverhead || len(raw) > n)
	whole := len(raw) == n && (end || st.method.shape == shapeUnary)
	switch {
	case odd, end && !whole:
		st.toReference(raw, end)
	case whole:
		st.asks = true
		st.forward(ctx, raw)
	case len(st.asked) == 0:
		st.asked = append(st.asked, data...)
	}
}

// length is that of the message at the front of raw.
func (*fstream) length(raw []byte) int {
	return int(binary.BigEndian.Uint32(raw[1:headLength]))
}

// forward sends a whole request on.
func (st *fstream) forward(ctx context.Context, raw []byte) {
	msg := raw[headLength:]
	edited := msg
	if st.call != nil {
		var err error
		if edited, err = st.call.request(ctx, msg); wouldWait(ctx, err) {
			raw = bytes.Clone(raw)
			st.park(&st.inward, func(ctx context.Context) { st.forward(ctx, raw) })
			return
		} else if err != nil {
			st.method.metrics.received.Inc()
			st.fail(err)
			return
		}
		if x, ok := st.call.(exchanger); ok && x.exchanges() {
			st.toReference(raw, true)
			return
		}
	}
	ok, waits := st.connect(ctx)
	switch {
	case waits:
		raw = bytes.Clone(raw)
		st.park(&st.inward, func(ctx context.Context) { st.forward(ctx, raw) })
		return
	case !ok:
		st.toReference(raw, true)
		return
	}
	if st.up == nil { // the client has left meanwhile
		return
	}
	st.method.metrics.received.Inc()
	st.watch.stop()
	st.up.Data(true, head(len(edited)), edited)
	st.asked = nil
}

// head is that of a message of n bytes.
func head(n int) []byte {
	return binary.BigEndian.AppendUint32([]byte{0}, uint32(n)) //nolint:gosec // messages are shorter than 4 GiB
}

// messages sends on what is whole of a stream of messages.
func (st *fstream) messages(_ context.Context, data []byte, end bool) {
	raw := data
	if len(st.asked) > 0 {
		st.asked = append(st.asked, data...)
		raw = st.asked
	}
	st.heldIn.Add(int64(len(data)))
	all, begun := true, len(raw)
	for len(raw) >= headLength {
		n := st.length(raw)
		switch {
		case raw[0] == 1:
			st.fail(status.Error(codes.Internal, "grpc: compressed flag set with identity or empty encoding"))
			return
		case raw[0] != 0:
			st.fail(status.Errorf(codes.Internal, "grpc: received unexpected payload format %d", raw[0]))
			return
		}
		if limit := st.session.engine.core.maxRequest + grpcOverhead; n > limit {
			st.fail(status.Errorf(codes.ResourceExhausted, "grpc: received message larger than max (%d vs. %d)", n, limit))
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
			if msg, err = st.call.request(st.session.engine.base, msg); err != nil {
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
		st.fail(status.Error(codes.Internal, io.ErrUnexpectedEOF.Error()))
		return
	}
	if len(raw) < begun || len(st.asked) == 0 { // else it is what has gathered: one frame more does not copy that
		st.asked = append(st.asked[:0:0], raw...)
	}
	if end {
		all = st.up.Data(true, nil, nil)
	}
	if all && !st.up.HasQueued() {
		st.creditClient()
	}
}

func (st *fstream) isLocal() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.local
}
