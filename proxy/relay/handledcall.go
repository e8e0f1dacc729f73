package relay

import (
	"context"
	"encoding/binary"
	"errors"
	"io"
	"sync"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// streamInput holds what has arrived on a stream of a client's until its goroutine reads it. The
// stream's flow-control window bounds it.
type streamInput struct {
	consumed func(n int)   // gives bytes back to the window
	arrived  chan struct{} // has room for one: something has arrived

	mu   sync.Mutex
	data []byte
	end  bool
}

func newStreamInput(consumed func(n int), data []byte, end bool) streamInput {
	return streamInput{consumed: consumed, arrived: make(chan struct{}, 1), data: data, end: end}
}

// add takes what has arrived.
func (in *streamInput) add(data []byte, end bool) {
	in.mu.Lock()
	if !in.end { // else it is not for the handler
		in.data = append(in.data, data...)
		in.end = end
	}
	in.mu.Unlock()
	select {
	case in.arrived <- struct{}{}:
	default:
	}
}

// take moves what there is into b.
func (in *streamInput) take(b []byte) (n int, end bool) {
	in.mu.Lock()
	n = copy(b, in.data)
	in.data = in.data[n:]
	if len(in.data) == 0 {
		in.data = nil
	}
	end = in.end && len(in.data) == 0
	in.mu.Unlock()
	if n > 0 {
		in.consumed(n)
	}
	return n, end
}

// buffered returns how many bytes there are to read.
func (in *streamInput) buffered() int {
	in.mu.Lock()
	defer in.mu.Unlock()
	return len(in.data)
}

// read waits for something to come, or for the end, which is io.EOF.
func (in *streamInput) read(ctx context.Context, b []byte) (int, error) {
	for {
		n, end := in.take(b)
		switch {
		case n > 0:
			return n, nil
		case end:
			return 0, io.EOF
		}
		select {
		case <-in.arrived:
		case <-ctx.Done():
			return 0, status.FromContextError(ctx.Err()).Err()
		}
	}
}

// handledCall is a call on a client's connection that a handler serves, on a goroutine of its own.
// It is the stream that the handler sees: one goroutine may receive and another send.
type handledCall struct {
	rpc.ReplyMetadata
	stream *clientStream
	in     streamInput
	// bytes of the message that is received, and not returned to the window
	received     int
	writable     chan struct{} // has room for one: what waited for the client was sent
	ctx          context.Context
	cancel       context.CancelFunc
	compressor   encoding.Compressor // nil for none
	encoding     string
	responseType string
}

var _ grpc.ServerStream = (*handledCall)(nil)

// handle has the handler of the method serve the call. raw is what the client has sent so far.
func handle(st *clientStream, h *requestHead, raw []byte, end bool) {
	st.watch.Discard() // the handler measures it
	st.pending = nil
	compressor, err := h.compressor()
	if err != nil {
		st.fail(err)
		return
	}
	ctx, cancel := st.session.engine.base, context.CancelFunc(nil)
	if h.timeoutField != "" {
		ctx, cancel = context.WithTimeout(ctx, h.timeout)
	} else {
		ctx, cancel = context.WithCancel(ctx)
	}
	c := &handledCall{
		stream: st, writable: make(chan struct{}, 1),
		ctx: metadata.NewIncomingContext(ctx, incomingMetadata(st.fields)), cancel: cancel,
		compressor: compressor, encoding: h.encoding, responseType: h.responseType(),
	}
	c.in = newStreamInput(func(n int) { c.received += n }, raw, end)
	if !st.moveTo(c) {
		cancel()
		return
	}
	st.session.work.Go(func() {
		defer cancel()
		c.finish(st.method.Handle(st.session.id, c))
	})
}

// data implements streamHandler.
func (c *handledCall) data(data []byte, end bool) { c.in.add(data, end) }

// clientGone implements streamHandler.
func (c *handledCall) clientGone() { c.cancel() }

// drained implements streamHandler.
func (c *handledCall) drained() {
	select {
	case c.writable <- struct{}{}:
	default:
	}
}

// finish tells the client the end.
func (c *handledCall) finish(err error) {
	c.cancel()
	st := c.stream
	if !st.finish(status.Code(err)) {
		return
	}
	defer st.session.flush()
	if errors.Is(c.ctx.Err(), context.DeadlineExceeded) {
		st.client.Reset(http2.ErrCodeCancel) // as grpc-go ends a call whose time is over
		return
	}
	var fields []hpack.HeaderField
	switch {
	case c.Sent:
	case len(c.Header) > 0:
		_ = c.SendHeader(nil)
	default:
		fields = c.headerFields()
	}
	s := status.Convert(err)
	if len(s.Proto().GetDetails()) > 0 {
		delete(c.Trailer, "grpc-status-details-bin")
	}
	st.client.Headers(rpc.MetadataFields(rpc.StatusFields(fields, s), c.Trailer), true)
}

func (c *handledCall) headerFields() []hpack.HeaderField {
	return []hpack.HeaderField{{Name: ":status", Value: "200"}, {Name: "content-type", Value: c.responseType}}
}

// Context implements grpc.ServerStream.
func (c *handledCall) Context() context.Context { return c.ctx }

// SendHeader implements grpc.ServerStream.
func (c *handledCall) SendHeader(md metadata.MD) error {
	if err := c.SetHeader(md); err != nil {
		return err
	}
	c.sendHeader()
	c.stream.session.flush()
	return nil
}

func (c *handledCall) sendHeader() {
	c.Sent = true
	fields := c.headerFields()
	if c.compressor != nil {
		fields = append(fields, hpack.HeaderField{Name: "grpc-encoding", Value: c.encoding})
	}
	c.stream.client.Headers(rpc.MetadataFields(fields, c.Header), false)
}

// SendMsg implements grpc.ServerStream, for frames. It waits until the client takes the message
// before.
func (c *handledCall) SendMsg(m any) error {
	f, err := rpc.MessageOf(m)
	if err != nil {
		return err
	}
	if !c.Sent {
		c.sendHeader()
	}
	head := make([]byte, rpc.HeaderLength)
	if c.compressor != nil && f.Data.Len() > 0 {
		if err := f.Compress(c.compressor); err != nil {
			return err
		}
		head[0] = 1
	}
	for c.stream.client.HasQueued() {
		select {
		case <-c.writable:
		case <-c.ctx.Done():
			f.Free()
			return status.FromContextError(c.ctx.Err()).Err()
		}
	}
	binary.BigEndian.PutUint32(head[1:], uint32(f.Data.Len())) //nolint:gosec // messages are shorter than 4 GiB
	c.stream.client.Buffers(false, head, f.Data)
	if c.stream.method.Shape != etcdapi.ShapeUnary { // else the end follows
		c.stream.session.flush()
	}
	return nil
}

// RecvMsg implements grpc.ServerStream, for frames. Its errors are those of grpc-go's server.
func (c *handledCall) RecvMsg(m any) error {
	shape := c.stream.method.Shape
	f, err := c.receive()
	switch {
	case shape == etcdapi.ShapeServerStream && errors.Is(err, io.EOF):
		return errNoMessage
	case shape != etcdapi.ShapeUnary && errors.Is(err, io.ErrUnexpectedEOF):
		return errCutMessage
	case err != nil:
		return err
	case shape == etcdapi.ShapeServerStream: // nothing may follow
		more, err := c.receive()
		if err == nil {
			more.Free()
			err = errManyMessages
		}
		if !errors.Is(err, io.EOF) {
			f.Free()
			return err
		}
	}
	return f.Decode(m)
}

var (
	errManyMessages = status.Error(codes.Internal, "cardinality violation: received multiple request messages for non-client-streaming RPC")
	errNoMessage    = status.Error(codes.Internal, "cardinality violation: received no request message from non-client-streaming RPC")
)

// receive returns the next message. io.EOF is the end, also of a client that ends within the head
// of a message.
func (c *handledCall) receive() (*rpc.Message, error) {
	var head [rpc.HeaderLength]byte
	if err := c.readFull(head[:]); err != nil {
		return nil, err
	}
	length := int(binary.BigEndian.Uint32(head[1:]))
	if err := rpc.CheckMessage(head[0], length, c.stream.session.engine.maxMessage, c.compressor != nil); err != nil {
		return nil, err
	}
	if rest := length - c.in.buffered(); rest > 0 {
		c.stream.client.Expect(rest)
		c.stream.session.flush()
	}
	f := new(rpc.Message)
	for length > 0 { // no buffer of its whole length before it has arrived
		part := rpc.Buffers.Get(min(length, rpc.PartSize))
		f.Data = append(f.Data, mem.NewBuffer(part, rpc.Buffers))
		if err := c.readFull(*part); err != nil {
			f.Free()
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return nil, err
		}
		length -= len(*part)
	}
	if head[0] == 1 {
		if err := f.Decompress(c.compressor, c.stream.session.engine.maxMessage); err != nil {
			return nil, err
		}
	}
	if c.stream.method.Shape != etcdapi.ShapeUnary { // else the message counts until the call ends
		c.stream.client.Consumed(c.received)
		c.stream.session.flush()
		c.received = 0
	}
	return f, nil
}

// errCutMessage is the error for a stream that ends within a message.
var errCutMessage = status.Error(codes.Internal, io.ErrUnexpectedEOF.Error())

func (c *handledCall) readFull(b []byte) error {
	for len(b) > 0 {
		n, err := c.in.read(c.ctx, b)
		if err != nil {
			return err
		}
		b = b[n:]
	}
	return nil
}
