package etcdapi

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// handleStream moves a stream. This goroutine moves what etcd sends; a stream on which the client
// sends too has one more, which moves that.
func (m *Method) handleStream(id *listener.Identity, ss grpc.ServerStream) error {
	ctx, cancel := m.untilDrain(ss.Context())
	defer cancel(nil)
	if err := m.pass(ctx, id.Upstream, nil); err != nil {
		return err
	}
	c := m.NewCall(id, new(CallMemory))
	var first *rpc.Message
	if m.Shape == ShapeServerStream {
		first = new(rpc.Message)
		defer func() { first.Free() }()
		if err := ss.RecvMsg(first); err != nil {
			return err
		}
		m.Metrics.Received.Inc()
		if c != nil {
			if err := first.Edit(func(msg []byte) ([]byte, error) { return requested(ctx, c, msg) }); err != nil {
				return err
			}
		}
	}
	if own, ok := c.(*electionCall); ok && own.hosted {
		return m.api.hostedServices.stream(ctx, m, first, ss)
	}
	id.Upstream.WaitConnected(ctx)
	if x, ok := c.(streamExchanger); ok && x.Exchanges() {
		return m.exchangeStream(ctx, id.Upstream, ss, first, x)
	}
	conn := id.Upstream.Acquire()
	defer conn.Release()
	cs, err := conn.Conn.NewStream(upstream.OutgoingContext(ctx), m.streamDesc(), m.Path)
	if err != nil {
		return ended(ctx, err, responseMetadata{})
	}
	if first != nil {
		// An end of the stream is told in full by the first receive.
		if err := cs.SendMsg(first); err != nil && !errors.Is(err, io.EOF) {
			return ended(ctx, err, responseMetadata{})
		}
	} else {
		m.api.Running.Go(func() { m.pump(ctx, cancel, ss, cs, c) })
	}
	return m.receive(ctx, ss, cs, c)
}

// receive moves what etcd sends.
func (m *Method) receive(ctx context.Context, ss grpc.ServerStream, cs grpc.ClientStream, c Call) error {
	header, err := cs.Header()
	if err == nil && header != nil {
		if err := ss.SendHeader(header); err != nil {
			return err
		}
	}
	out := new(rpc.Message)
	defer func() { out.Free() }()
	for {
		if err := cs.RecvMsg(out); err != nil {
			trailer := cs.Trailer()
			ss.SetTrailer(trailer)
			if errors.Is(err, io.EOF) {
				return nil
			}
			return ended(ctx, err, responseMetadata{header, trailer})
		}
		if c != nil && c.Scans() {
			if err := out.Replace(!c.Parts(), func(dst, msg []byte) ([]byte, error) { return c.Response(Blocking(ctx), dst, msg) }); err != nil {
				return err
			}
		}
		if err := m.send(ss, out, c); err != nil {
			return err
		}
	}
}

// exchangeStream has x serve a stream with one request by requests of its own. The client gets
// headers and trailers as with exchange.
func (m *Method) exchangeStream(ctx context.Context, to *upstream.Cluster, ss grpc.ServerStream, in *rpc.Message, x streamExchanger) error {
	s := &sender{ctx: ctx, to: to}
	begun := false
	err := x.exchangeStream(ctx, in.Data.Materialize(), s.send, func(msg []byte) error {
		if !begun {
			begun = true
			if err := ss.SendHeader(s.good.header); err != nil {
				return err
			}
		}
		if err := ss.SendMsg(rpc.NewMessage(msg)); err != nil {
			return err
		}
		m.Metrics.Sent.Inc()
		return nil
	})
	last := s.last(err)
	if begun {
		last.header = nil
	}
	if serr := last.set(ss); err == nil {
		err = serr
	}
	return err
}

// send sends a response, or what c cuts it into.
func (m *Method) send(ss grpc.ServerStream, out *rpc.Message, c Call) error {
	var all [][]byte
	if x, ok := c.(Splitter); ok && x.Splits() {
		err := out.Edit(func(msg []byte) (_ []byte, err error) {
			all, err = x.Split(msg)
			return msg, err
		})
		if err != nil {
			return err
		}
	}
	if all == nil {
		all = [][]byte{nil}
	} else {
		out.Free()
	}
	for _, msg := range all {
		if msg != nil {
			out.Data = mem.BufferSlice{mem.SliceBuffer(msg)}
		}
		if err := ss.SendMsg(out); err != nil {
			return err
		}
		m.Metrics.Sent.Inc()
	}
	return nil
}

// pump moves what the client sends until the client half-closes, which etcd is told, or the stream
// ends. What goes wrong here ends the stream, with its own status.
func (m *Method) pump(ctx context.Context, cancel context.CancelCauseFunc, ss grpc.ServerStream, cs grpc.ClientStream, c Call) {
	in := new(rpc.Message)
	defer func() { in.Free() }()
	for {
		if err := ss.RecvMsg(in); err != nil {
			if errors.Is(err, io.EOF) {
				_ = cs.CloseSend() // never fails; an ended stream tells its receiver
				return
			}
			cancel(err)
			return
		}
		m.Metrics.Received.Inc()
		if c != nil {
			if err := in.Edit(func(msg []byte) ([]byte, error) { return c.Request(Blocking(ctx), msg) }); err != nil {
				cancel(err)
				return
			}
		}
		if err := cs.SendMsg(in); err != nil {
			return // the receiving side learns why
		}
	}
}
