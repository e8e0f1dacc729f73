package etcdapi

import (
	"context"
	"io"
	"sync"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// LocalConn is an in-memory connection of gRPC to the proxy's own handlers. It is safe for
// concurrent use.
type LocalConn struct {
	Api *API
	// of the client that a call is made for
	Identity func(context.Context) (*listener.Identity, error)
}

var _ grpc.ClientConnInterface = LocalConn{}

// prepare returns the method of a call, the identity of the client that it is made for, and the
// context of its handler.
func (c LocalConn) prepare(ctx context.Context, path string) (*Method, *listener.Identity, context.Context, error) {
	id, err := c.Identity(ctx)
	if err != nil {
		return nil, nil, nil, err
	}
	m, err := c.Api.Lookup(path)
	if err != nil {
		return nil, nil, nil, err
	}
	if err := c.Api.Authorize(id, m); err != nil {
		return nil, nil, nil, err
	}
	md, _ := metadata.FromOutgoingContext(ctx)
	return m, id, metadata.NewIncomingContext(ctx, md), nil
}

// Invoke implements grpc.ClientConnInterface. The handler runs on the goroutine of the caller.
func (c LocalConn) Invoke(ctx context.Context, path string, args, reply any, opts ...grpc.CallOption) error {
	m, id, ctx, err := c.prepare(ctx, path)
	if err != nil {
		return err
	}
	in, err := rpc.MessageOf(args)
	if err != nil {
		return status.Errorf(codes.Internal, "grpc: error while marshaling: %v", err)
	}
	call := &localUnary{ctx: ctx, in: in}
	defer call.out.Free()
	err = m.Handle(id, call)
	call.Sent = call.Sent || len(call.Header) > 0
	header, trailer := call.Received()
	for _, o := range opts {
		switch o := o.(type) {
		case grpc.HeaderCallOption:
			*o.HeaderAddr = header
		case grpc.TrailerCallOption:
			*o.TrailerAddr = trailer
		}
	}
	if err != nil {
		return err
	}
	if err := call.out.Decode(reply); err != nil {
		return status.Errorf(codes.Internal, "grpc: failed to unmarshal the received message: %v", err)
	}
	return nil
}

// localUnary is a unary call as its handler sees it.
type localUnary struct {
	rpc.ReplyMetadata
	ctx context.Context
	in  *rpc.Message
	out rpc.Message
}

var _ grpc.ServerStream = (*localUnary)(nil)

// Context implements grpc.ServerStream.
func (u *localUnary) Context() context.Context { return u.ctx }

// SendHeader implements grpc.ServerStream.
func (u *localUnary) SendHeader(md metadata.MD) error {
	defer func() { u.Sent = true }()
	return u.SetHeader(md)
}

// RecvMsg implements grpc.ServerStream.
func (u *localUnary) RecvMsg(m any) error {
	if u.in == nil {
		return io.EOF
	}
	err := u.in.Decode(m)
	u.in = nil
	return err
}

// SendMsg implements grpc.ServerStream.
func (u *localUnary) SendMsg(m any) error {
	out, err := rpc.MessageOf(m)
	if err != nil {
		return err
	}
	u.Sent, u.out = true, *out
	return nil
}

// NewStream implements grpc.ClientConnInterface. The handler has a goroutine of its own, which ends
// with ctx at the latest.
func (c LocalConn) NewStream(ctx context.Context, _ *grpc.StreamDesc, path string, _ ...grpc.CallOption) (grpc.ClientStream, error) {
	m, id, serverCtx, err := c.prepare(ctx, path)
	if err != nil {
		return nil, err
	}
	s := &localStream{ctx: serverCtx, requests: make(chan *rpc.Message), closed: make(chan struct{}), responses: make(chan *rpc.Message), begun: make(chan struct{}), done: make(chan struct{})}
	c.Api.Running.Go(func() {
		err := m.Handle(id, (*localHandler)(s))
		s.mu.Lock()
		s.err = err
		s.mu.Unlock()
		close(s.done)
	})
	return s, nil
}

// localStream is a stream as its client sees it, and its state. Messages are handed over one at a
// time: who sends waits for the receiver.
type localStream struct {
	ctx                 context.Context
	requests, responses chan *rpc.Message
	closed              chan struct{} // by CloseSend
	once                sync.Once
	begun               chan struct{} // closed when the header is sent
	done                chan struct{} // closed when the handler has returned

	mu       sync.Mutex
	metadata rpc.ReplyMetadata
	err      error // of the handler
}

var (
	_ grpc.ClientStream = (*localStream)(nil)
	_ grpc.ServerStream = (*localHandler)(nil)
)

// Header implements grpc.ClientStream.
func (s *localStream) Header() (metadata.MD, error) {
	select {
	case <-s.begun:
	case <-s.done:
	case <-s.ctx.Done():
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	header, _ := s.metadata.Received()
	return header, nil // RecvMsg tells why there is none
}

// Trailer implements grpc.ClientStream.
func (s *localStream) Trailer() metadata.MD {
	s.mu.Lock()
	defer s.mu.Unlock()
	_, trailer := s.metadata.Received()
	return trailer
}

// CloseSend implements grpc.ClientStream.
func (s *localStream) CloseSend() error {
	s.once.Do(func() { close(s.closed) })
	return nil
}

// Context implements grpc.ClientStream.
func (s *localStream) Context() context.Context { return s.ctx }

// SendMsg implements grpc.ClientStream.
func (s *localStream) SendMsg(m any) error {
	f, err := rpc.MessageOf(m)
	if err != nil {
		return status.Errorf(codes.Internal, "grpc: error while marshaling: %v", err)
	}
	select {
	case s.requests <- f:
		return nil
	case <-s.done:
		return io.EOF // RecvMsg tells why
	case <-s.ctx.Done():
		return io.EOF
	}
}

// RecvMsg implements grpc.ClientStream.
func (s *localStream) RecvMsg(m any) error {
	select {
	case f := <-s.responses:
		defer f.Free()
		if err := f.Decode(m); err != nil {
			return status.Errorf(codes.Internal, "grpc: failed to unmarshal the received message: %v", err)
		}
		return nil
	case <-s.done:
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.err == nil {
			return io.EOF
		}
		return s.err
	case <-s.ctx.Done():
		return status.FromContextError(s.ctx.Err()).Err()
	}
}

// localHandler is a localStream as its handler sees it.
type localHandler localStream

// Context implements grpc.ServerStream.
func (h *localHandler) Context() context.Context { return h.ctx }

// SetHeader implements grpc.ServerStream.
func (h *localHandler) SetHeader(md metadata.MD) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.metadata.SetHeader(md)
}

// SendHeader implements grpc.ServerStream.
func (h *localHandler) SendHeader(md metadata.MD) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if err := h.metadata.SetHeader(md); err != nil {
		return err
	}
	h.metadata.Sent = true
	close(h.begun)
	return nil
}

// SetTrailer implements grpc.ServerStream.
func (h *localHandler) SetTrailer(md metadata.MD) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.metadata.SetTrailer(md)
}

// SendMsg implements grpc.ServerStream.
func (h *localHandler) SendMsg(m any) error {
	f, err := rpc.MessageOf(m)
	if err != nil {
		return err
	}
	h.mu.Lock()
	if !h.metadata.Sent {
		h.metadata.Sent = true
		close(h.begun)
	}
	h.mu.Unlock()
	select {
	case h.responses <- f:
		return nil
	case <-h.ctx.Done():
		f.Free()
		return status.FromContextError(h.ctx.Err()).Err()
	}
}

// RecvMsg implements grpc.ServerStream.
func (h *localHandler) RecvMsg(m any) error {
	select {
	case f := <-h.requests:
		return f.Decode(m)
	case <-h.closed:
		return io.EOF
	case <-h.done:
		return io.EOF // of the handler's other goroutine
	case <-h.ctx.Done():
		return status.FromContextError(h.ctx.Err()).Err()
	}
}
