package proxy

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/binary"
	"errors"
	"io"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/h2"
)

// fstream is one call on its way through the frame engine: a stream of the client's and one that it goes on to.
//
// What comes from the client is handled on the goroutine that reads the client's connection, and what comes from etcd on the one that reads etcd's. Where a value can
// only be sealed or opened with the KMS, a goroutine of its own does that direction of the call from there on, until it has caught up: nobody else waits.
type fstream struct {
	session *session
	method  *grpcMethod // nil for what goes on to the reference engine
	call    call        // nil if the method's messages are not looked into
	client  *h2.Stream
	fields  []hpack.HeaderField // the client's, until they are sent on
	answers answers             // what comes back
	asked   []byte              // what the client has sent, with gRPC's heads, and was not sent on
	silent  bool                // the client's headers were its last word, which is not the same as an end without a message
	ended   atomic.Bool         // the client was told the end, or has left

	heldIn, heldOut atomic.Int64 // bytes from the client and from etcd that have not been sent on

	mu              sync.Mutex
	local           bool       // it goes on to the reference engine
	begun           bool       // the client was sent the header of the answer
	up              *h2.Stream // where it goes on to; nil before it does
	cancel          context.CancelCauseFunc
	inward, outward parking
}

// parking is a direction of a call that a goroutine of its own has taken over. It is under the stream's mu.
type parking struct {
	parked  bool
	backlog []piece // what has come meanwhile
}

// headLength is that of the head of a gRPC message: a flag and four bytes of length.
const headLength = 5

// hasty is the context of who does not wait, see [Sealer].
var hasty = func() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	return ctx
}()

// wouldWait reports whether err may be for want of time: what a message itself has brought about stays as it is.
func wouldWait(ctx context.Context, err error) bool {
	if ctx != hasty || err == nil {
		return false
	}
	switch status.Code(err) {
	case codes.InvalidArgument, codes.PermissionDenied, codes.Unimplemented, codes.Internal:
		return false
	}
	return true
}

// begin is the client's headers.
func (st *fstream) begin(end bool) {
	st.silent = end
	if st.method == nil {
		st.toReference(nil, end)
		return
	}
	if st.method.waits && st.session.engine.leaving.Load() {
		st.method.metrics.started.Inc()
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
		st.inward.backlog = append(st.inward.backlog, piece{data: bytes.Clone(data), end: end})
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
		st.client.Credit(len(data))
	case st.isLocal():
		st.pass(data, end)
	case st.method.shape == shapeBidiStream:
		st.messages(ctx, data, end)
	default:
		st.client.Credit(len(data))
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
		st.client.Credit(int(n))
	}
}

func (st *fstream) creditUp() {
	n := st.heldOut.Swap(0)
	st.mu.Lock()
	up := st.up
	st.mu.Unlock()
	if n > 0 && up != nil {
		up.Credit(int(n))
	}
}

// unary gathers the one message of a call and sends it on when it is whole. What is not just one message is the reference engine's to judge.
func (st *fstream) unary(ctx context.Context, data []byte, end bool) {
	raw := data
	if len(st.asked) > 0 || !end {
		st.asked = append(st.asked, data...)
		raw = st.asked
	}
	odd := len(raw) >= headLength && (raw[0] != 0 || st.length(raw) > st.session.engine.core.maxRequest+grpcOverhead || len(raw) > headLength+st.length(raw))
	switch {
	case odd, end && (len(raw) < headLength || len(raw) < headLength+st.length(raw)):
		st.toReference(raw, end)
	case end:
		st.forward(ctx, raw)
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
			st.method.metrics.started.Inc()
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
	all := true
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
	st.asked = append(st.asked[:0:0], raw...)
	if end {
		all = st.up.Data(true, nil, nil)
	}
	if all && !st.up.Waits() {
		st.creditClient()
	}
}

// connect goes on to etcd. waits says that there may be a connection for a context that waits; else, without ok, there is none. Calls that last are worth waiting for one: the reference
// engine would have them for as long.
func (st *fstream) connect(ctx context.Context) (ok, waits bool) {
	lasts := st.method.shape != shapeUnary
	conn, h, hope := st.session.pick()
	if conn == nil && (hope == outlookDialing || hope == outlookDown && lasts) {
		if ctx == hasty {
			return false, true
		}
		conn, h = st.session.await(ctx, lasts)
	}
	return conn != nil && st.open(conn, h), false
}

// open opens a stream with the client's header fields, if the client is still there. It reports false if the connection takes none.
func (st *fstream) open(conn *h2.Conn, h *hop) bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.ended.Load() {
		return true
	}
	scheme, authority := st.session.id.to.origin(h.endpoint)
	if st.up = conn.Open(st, upstreamFields(st.fields, scheme, authority), false); st.up == nil {
		return false
	}
	st.method.metrics.started.Inc()
	return true
}

// toReference goes on to the reference engine with what the client has sent so far.
func (st *fstream) toReference(raw []byte, end bool) {
	conn := st.session.reference()
	st.mu.Lock()
	if st.ended.Load() {
		st.mu.Unlock()
		return
	}
	if conn != nil {
		st.local = true
		st.up = conn.Open(st, st.fields, st.silent)
	}
	up := st.up
	st.mu.Unlock()
	if up == nil {
		st.fail(errShuttingDown)
		return
	}
	if !st.silent && (end || len(raw) > 0) {
		up.Data(end, nil, raw)
	}
	st.asked = nil
}

func (st *fstream) isLocal() bool {
	st.mu.Lock()
	defer st.mu.Unlock()
	return st.local
}

// park has a goroutine of its own do work, and then what comes for the direction p meanwhile. The goroutine that calls it is the one that has the direction. work may wait.
func (st *fstream) park(p *parking, work func(ctx context.Context)) {
	st.mu.Lock()
	defer st.mu.Unlock()
	if st.ended.Load() {
		return
	}
	ctx, cancel := context.WithCancelCause(st.session.engine.base)
	p.parked = true
	before := st.cancel
	st.cancel = func(cause error) {
		cancel(cause)
		if before != nil {
			before(cause)
		}
	}
	st.session.work.Go(func() {
		defer cancel(nil)
		ctx := ctx
		for _, f := range st.fields {
			if d := timeoutOf(f.Value); f.Name == "grpc-timeout" && d > 0 {
				var stop context.CancelFunc
				ctx, stop = context.WithTimeout(ctx, d)
				defer stop()
			}
		}
		work(ctx)
		for {
			st.session.flush()
			st.mu.Lock()
			all := p.backlog
			p.backlog = nil
			if len(all) == 0 || st.ended.Load() {
				p.parked, p.backlog = false, nil
				st.mu.Unlock()
				return
			}
			st.mu.Unlock()
			for _, next := range all {
				if p == &st.inward {
					st.request(ctx, next.data, next.end)
				} else {
					st.answer(ctx, next)
				}
			}
		}
	})
}

// finish says once that the call is over, with the code that is counted.
func (st *fstream) finish(code codes.Code) bool {
	if st.ended.Swap(true) {
		return false
	}
	st.mu.Lock()
	cancel, counts := st.cancel, st.method != nil && !st.local
	st.mu.Unlock()
	if cancel != nil {
		cancel(nil)
	}
	if counts {
		st.method.metrics.end(code)
	}
	return true
}

// leaveUp has etcd hear no more of a call.
func (st *fstream) leaveUp() {
	st.mu.Lock()
	up := st.up
	st.mu.Unlock()
	if up != nil {
		up.Reset(http2.ErrCodeCancel)
	}
}

// left is the client's end of the call: it has reset the stream, or its connection has ended.
func (st *fstream) left() {
	if st.finish(codes.Canceled) {
		st.leaveUp()
	}
}

// fail ends the call with a status of the proxy's own.
func (st *fstream) fail(err error) {
	s := status.Convert(err)
	if !st.finish(s.Code()) {
		return
	}
	fields := make([]hpack.HeaderField, 0, 5)
	st.mu.Lock()
	begun := st.begun
	st.mu.Unlock()
	if !begun {
		fields = append(fields, hpack.HeaderField{Name: ":status", Value: "200"}, hpack.HeaderField{Name: "content-type", Value: contentType})
	}
	fields = append(fields, hpack.HeaderField{Name: "grpc-status", Value: strconv.Itoa(int(s.Code()))}, hpack.HeaderField{Name: "grpc-message", Value: percent(s.Message())})
	if p := s.Proto(); len(p.GetDetails()) > 0 {
		if b, err := proto.Marshal(p); err == nil {
			fields = append(fields, hpack.HeaderField{Name: "grpc-status-details-bin", Value: base64.RawStdEncoding.EncodeToString(b)})
		}
	}
	st.client.Headers(fields, true)
	st.leaveUp()
}

// reset is etcd's end of the call, without a status.
func (st *fstream) reset(code http2.ErrCode) {
	if st.finish(codes.Unavailable) {
		st.client.Reset(code)
	}
}

// lost ends a call whose connection has ended.
func (st *fstream) lost(why error) {
	if errno := syscall.Errno(0); errors.As(why, &errno) {
		why = errno // clients are told what, as by etcd, and not where etcd is
	}
	if st.isLocal() { // the reference engine goes with the proxy alone
		st.fail(errShuttingDown)
		return
	}
	err := status.Errorf(codes.Unavailable, "error reading from server: %v", why)
	st.mu.Lock()
	begun := st.begun
	st.mu.Unlock()
	if !begun {
		err = ownError(codes.Unavailable, "etcd is unreachable: "+status.Convert(err).Message())
	}
	st.fail(err)
}
