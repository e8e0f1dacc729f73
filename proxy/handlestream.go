package proxy

import (
	"context"
	"errors"
	"io"

	"google.golang.org/grpc"
	"google.golang.org/grpc/mem"
)

// handleStream moves a stream. This goroutine moves what etcd sends; a stream on which the client sends too has one more, which moves that.
func (m *method) handleStream(id *Identity, ss grpc.ServerStream) error {
	ctx, cancel := m.untilDrain(ss.Context())
	defer cancel(nil)
	if err := m.pass(ctx, id.to, nil); err != nil {
		return err
	}
	c := m.newCall(id)
	var first *frame
	if m.shape == shapeServerStream {
		first = new(frame)
		defer func() { first.free() }()
		if err := ss.RecvMsg(first); err != nil {
			return err
		}
		m.metrics.received.Inc()
		if c != nil {
			if err := first.edit(func(msg []byte) ([]byte, error) { return requested(ctx, c, msg) }); err != nil {
				return err
			}
		}
	}
	if own, ok := c.(*electionCall); ok && own.hosted {
		return m.api.coordination.stream(ctx, m, first, ss)
	}
	id.to.await(ctx)
	if x, ok := c.(streamExchanger); ok && x.exchanges() {
		return m.exchangeStream(ctx, id.to, ss, first, x)
	}
	lane := id.to.take()
	defer lane.done()
	cs, err := lane.conn.NewStream(upstreamContext(ctx), m.streamDesc(), m.full)
	if err != nil {
		return ended(ctx, err, around{})
	}
	if first != nil {
		// An end of the stream is told in full by the first receive.
		if err := cs.SendMsg(first); err != nil && !errors.Is(err, io.EOF) {
			return ended(ctx, err, around{})
		}
	} else {
		m.api.running.Go(func() { m.pump(ctx, cancel, ss, cs, c) })
	}
	return m.answers(ctx, ss, cs, c)
}

// answers moves what etcd sends.
func (m *method) answers(ctx context.Context, ss grpc.ServerStream, cs grpc.ClientStream, c call) error {
	header, err := cs.Header()
	if err == nil && header != nil {
		if err := ss.SendHeader(header); err != nil {
			return err
		}
	}
	out := new(frame)
	defer func() { out.free() }()
	for {
		if err := cs.RecvMsg(out); err != nil {
			trailer := cs.Trailer()
			ss.SetTrailer(trailer)
			if errors.Is(err, io.EOF) {
				return nil
			}
			return ended(ctx, err, around{header, trailer})
		}
		if c != nil && c.scans() {
			if err := out.replace(func(msg []byte) ([]byte, error) { return c.response(blocking(ctx), msg) }); err != nil {
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
func (m *method) exchangeStream(ctx context.Context, to *upstream, ss grpc.ServerStream, in *frame, x streamExchanger) error {
	a := &asking{ctx: ctx, to: to}
	begun := false
	err := x.exchangeStream(ctx, in.data.Materialize(), a.ask, func(msg []byte) error {
		if !begun {
			begun = true
			if err := ss.SendHeader(a.good.header); err != nil {
				return err
			}
		}
		if err := ss.SendMsg(frameOf(msg)); err != nil {
			return err
		}
		m.metrics.sent.Inc()
		return nil
	})
	last := a.last(err)
	if begun {
		last.header = nil
	}
	if serr := last.set(ss); err == nil {
		err = serr
	}
	return err
}

// send sends a response, or what c cuts it into.
func (m *method) send(ss grpc.ServerStream, out *frame, c call) error {
	var all [][]byte
	if x, ok := c.(cutter); ok && x.cuts() {
		err := out.edit(func(msg []byte) (_ []byte, err error) {
			all, err = x.cut(msg)
			return msg, err
		})
		if err != nil {
			return err
		}
	}
	if all == nil {
		all = [][]byte{nil}
	} else {
		out.free()
	}
	for _, msg := range all {
		if msg != nil {
			out.data = mem.BufferSlice{mem.SliceBuffer(msg)}
		}
		if err := ss.SendMsg(out); err != nil {
			return err
		}
		m.metrics.sent.Inc()
	}
	return nil
}

// pump moves what the client sends until the client half-closes, which etcd is told, or the stream ends. What goes wrong here ends
// the stream, with its own status.
func (m *method) pump(ctx context.Context, cancel context.CancelCauseFunc, ss grpc.ServerStream, cs grpc.ClientStream, c call) {
	in := new(frame)
	defer func() { in.free() }()
	for {
		if err := ss.RecvMsg(in); err != nil {
			if errors.Is(err, io.EOF) {
				_ = cs.CloseSend() // never fails; an ended stream tells its receiver
				return
			}
			cancel(err)
			return
		}
		m.metrics.received.Inc()
		if c != nil {
			if err := in.edit(func(msg []byte) ([]byte, error) { return c.request(blocking(ctx), msg) }); err != nil {
				cancel(err)
				return
			}
		}
		if err := cs.SendMsg(in); err != nil {
			return // the receiving side learns why
		}
	}
}
