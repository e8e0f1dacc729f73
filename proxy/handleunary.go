package proxy

import (
	"context"
	"errors"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

func (m *method) handleUnary(id *Identity, ss grpc.ServerStream) error {
	in := new(frame)
	if err := ss.RecvMsg(in); err != nil {
		return status.Convert(err).Err()
	}
	m.metrics.started.Inc()
	m.metrics.received.Inc()
	out, err := m.forward(ss, id, in)
	err = statusError(err)
	m.metrics.end(status.Code(err))
	if err != nil {
		return err
	}
	m.metrics.sent.Inc()
	return ss.SendMsg(out)
}

// pass waits for the gate, as long as calls wait for etcd. What a learner serves has a gate of its
// own; where only that one is open, other calls are refused with the learner's text. in is the
// request of a unary call, and nil for a stream.
func (m *method) pass(ctx context.Context, to *upstream, in *frame) error {
	if m.api.gateOpen() {
		return nil
	}
	timer := time.NewTimer(readyWait)
	defer timer.Stop()
	for learner := m.api.core.learnerGate; ; learner = nil {
		select {
		case <-m.api.core.gate:
			return nil
		case <-learner:
			if m.servedByLearner(in) {
				return nil
			}
			if err := to.refusal(ctx); err != nil {
				return err
			}
			continue // it was promoted just now, and the gate opens soon
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-m.api.draining.Done():
			return errShuttingDown
		case <-timer.C:
		}
		break
	}
	if !to.up.Load() {
		return ownError(codes.Unavailable, "etcd is unreachable: no endpoint is connected")
	}
	return ownError(codes.Unavailable, "the proxy has not yet compared its rules with those that the proxies agreed on in etcd")
}

// untilDrain returns a context for a call that waits for events: it also ends when the proxy drains.
func (m *method) untilDrain(ctx context.Context) (context.Context, context.CancelCauseFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	if !m.waits {
		return ctx, cancel
	}
	stop := context.AfterFunc(m.api.draining, func() { cancel(errShuttingDown) })
	return ctx, func(cause error) {
		stop()
		cancel(cause)
	}
}

// forward sends one request to etcd and returns the response. It owns in.
func (m *method) forward(ss grpc.ServerStream, id *Identity, in *frame) (*frame, error) {
	defer in.free()
	watch := stopwatch{on: sampled(m.api.unary.Add(1) - 1)}
	watch.start()
	ctx, cancel := m.untilDrain(ss.Context())
	defer cancel(nil)
	if err := m.pass(ctx, id.to, in); err != nil {
		return nil, err
	}
	c := m.newCall(id)
	if c != nil {
		if err := in.edit(func(msg []byte) ([]byte, error) { return requested(ctx, c, msg) }); err != nil {
			return nil, err
		}
	}
	watch.stop()
	if own, ok := c.(*electionCall); ok && own.hosted {
		return m.api.coordination.unary(ctx, m, in)
	}
	id.to.await(ctx)
	if x, ok := c.(exchanger); ok && x.exchanges() {
		return m.exchange(ctx, ss, id.to, in, x) // several calls of etcd: not measured
	}
	out := new(frame)
	var met around
	lane := id.to.take()
	defer lane.done()
	err := lane.conn.Invoke(upstreamContext(ctx), m.full, in, out, grpc.Header(&met.header), grpc.Trailer(&met.trailer))
	if watch.start(); !met.empty() { // etcd has answered
		defer watch.observe(m.metrics.added)
	}
	if serr := met.set(ss); serr != nil {
		return nil, serr
	}
	if err != nil {
		return nil, ended(ctx, err, met)
	}
	if c != nil && c.scans() {
		replace := out.replace
		if c.parts() {
			replace = out.replaceParts
		}
		if err := replace(func(msg []byte) ([]byte, error) { return c.response(blocking(ctx), msg) }); err != nil {
			out.free()
			return nil, err
		}
	}
	return out, nil
}

// exchange has x serve a request by requests of its own. The client gets the headers and trailers of the last one, or of the last one that failed.
func (m *method) exchange(ctx context.Context, ss grpc.ServerStream, to *upstream, in *frame, x exchanger) (*frame, error) {
	a := &asking{ctx: ctx, to: to}
	answer, err := x.exchange(ctx, in.data.Materialize(), a.ask)
	if serr := a.last(err).set(ss); err == nil {
		err = serr
	}
	if err != nil {
		return nil, err
	}
	return frameOf(answer), nil
}

// asking sends the requests that a call needs, and keeps what came around their answers.
type asking struct {
	ctx       context.Context // the client's
	to        *upstream
	good, bad around
}

// around is the metadata of a response of etcd's.
type around struct{ header, trailer metadata.MD }

func (a around) empty() bool { return len(a.header) == 0 && len(a.trailer) == 0 }

// set hands the metadata to the client.
func (a around) set(ss grpc.ServerStream) error {
	if len(a.trailer) > 0 {
		ss.SetTrailer(a.trailer)
	}
	if len(a.header) > 0 {
		return ss.SetHeader(a.header)
	}
	return nil
}

// ask is an asker.
func (a *asking) ask(ctx context.Context, method string, msg []byte, limit int) ([]byte, error) {
	var met around
	out := new(frame)
	defer out.free()
	lane := a.to.take()
	defer lane.done()
	err := lane.conn.Invoke(upstreamContext(ctx), method, frameOf(msg), out, grpc.Header(&met.header), grpc.Trailer(&met.trailer), grpc.MaxCallRecvMsgSize(limit))
	if err != nil {
		a.bad = met
		return nil, ended(a.ctx, err, met)
	}
	a.good = met
	return out.data.Materialize(), nil
}

// last is what came around the last answer, or around the last one that failed.
func (a *asking) last(err error) around {
	if err != nil {
		return a.bad
	}
	return a.good
}

// ended returns the status for a call that ended with err: the proxy's own if the proxy has ended it or etcd was never reached, and
// else etcd's, as it came. Whatever etcd answers has headers or trailers, a content type at the least.
func ended(ctx context.Context, err error, met around) error {
	if cause := ownCause(ctx); cause != nil {
		return cause
	}
	if met.empty() {
		if st := status.Convert(err); st.Code() == codes.Unavailable {
			return ownError(codes.Unavailable, "etcd is unreachable: "+st.Message())
		}
	}
	return err
}

// ownCause is the status for which the proxy itself has ended a call, and nil if it has not.
func ownCause(ctx context.Context) error {
	cause := context.Cause(ctx)
	var own interface{ GRPCStatus() *status.Status }
	if errors.As(cause, &own) {
		return cause
	}
	return nil
}

// servedByLearner reports whether a learner serves a call. in is the request of a unary call, and nil for a stream.
func (m *method) servedByLearner(in *frame) bool {
	switch m.full {
	case pb.Maintenance_Status_FullMethodName, pb.Maintenance_Snapshot_FullMethodName:
		return true
	case pb.KV_Range_FullMethodName:
		var r pb.RangeRequest
		return proto.Unmarshal(in.data.Materialize(), &r) == nil && r.Serializable
	}
	return false
}
