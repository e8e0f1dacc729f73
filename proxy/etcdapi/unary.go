package etcdapi

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

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/metrics"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// handleUnary handles a unary call that is not relayed.
func (m *Method) handleUnary(id *listener.Identity, ss grpc.ServerStream) error {
	in := new(rpc.Message)
	if err := ss.RecvMsg(in); err != nil {
		return status.Convert(err).Err()
	}
	m.Metrics.Started.Inc()
	m.Metrics.Received.Inc()
	out, err := m.forward(ss, id, in)
	err = statusError(err)
	m.Metrics.End(status.Code(err))
	if err != nil {
		return err
	}
	m.Metrics.Sent.Inc()
	return ss.SendMsg(out)
}

// pass waits for the gate, as long as calls wait for etcd. What a learner serves has a gate of its
// own; where only that one is open, other calls are refused with the learner's text. in is the
// request of a unary call, and nil for a stream.
func (m *Method) pass(ctx context.Context, to *upstream.Cluster, in *rpc.Message) error {
	if m.api.GateOpen() {
		return nil
	}
	timer := time.NewTimer(upstream.ConnectWait)
	defer timer.Stop()
	var ending <-chan struct{} // only of a call that waits for events
	if m.Indefinite {
		ending = m.api.draining.Done()
	}
	for learner := m.api.Core.LearnerGate; ; learner = nil {
		select {
		case <-m.api.Core.Gate:
			return nil
		case <-learner:
			if m.servedByLearner(in) {
				return nil
			}
			if err := to.LearnerRefusal(ctx); err != nil {
				return err
			}
			continue // it was promoted just now, and the gate opens soon
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-ending:
			return ErrShuttingDown
		case <-timer.C:
		}
		break
	}
	if !to.Connected.Load() {
		return rpc.Error(codes.Unavailable, "etcd is unreachable: no endpoint is connected")
	}
	return rpc.Error(codes.Unavailable, "the proxy has not yet compared its rules with those that the proxies agreed on in etcd")
}

// untilDrain returns a context for a call that waits for events: it also ends when the proxy
// drains.
func (m *Method) untilDrain(ctx context.Context) (context.Context, context.CancelCauseFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	if !m.Indefinite {
		return ctx, cancel
	}
	stop := context.AfterFunc(m.api.draining, func() { cancel(ErrShuttingDown) })
	return ctx, func(cause error) {
		stop()
		cancel(cause)
	}
}

// forward sends one request to etcd and returns the response. It owns in.
func (m *Method) forward(ss grpc.ServerStream, id *listener.Identity, in *rpc.Message) (*rpc.Message, error) {
	defer in.Free()
	watch := metrics.Stopwatch{On: metrics.Sampled(m.api.unary.Add(1) - 1)}
	watch.Start()
	ctx, cancel := m.untilDrain(ss.Context())
	defer cancel(nil)
	if err := m.pass(ctx, id.Upstream, in); err != nil {
		return nil, err
	}
	c := m.NewCall(id, new(CallMemory))
	if c != nil {
		if err := in.Edit(func(msg []byte) ([]byte, error) { return requested(ctx, c, msg) }); err != nil {
			return nil, err
		}
	}
	watch.Stop()
	if own, ok := c.(*electionCall); ok && own.hosted {
		return m.api.hostedServices.unary(ctx, m, in)
	}
	id.Upstream.WaitConnected(ctx)
	if x, ok := c.(Exchanger); ok && x.Exchanges() {
		return m.exchange(ctx, ss, id.Upstream, in, x) // several calls of etcd: not measured
	}
	out := new(rpc.Message)
	var metadata responseMetadata
	conn := id.Upstream.Acquire()
	defer conn.Release()
	err := conn.Conn.Invoke(upstream.OutgoingContext(ctx), m.Path, in, out, grpc.Header(&metadata.header), grpc.Trailer(&metadata.trailer))
	if watch.Start(); !metadata.empty() { // etcd has answered
		defer watch.Observe(m.Metrics.Added)
	}
	if serr := metadata.set(ss); serr != nil {
		return nil, serr
	}
	if err != nil {
		return nil, ended(ctx, err, metadata)
	}
	if c != nil && c.Scans() {
		if err := out.Replace(!c.Parts(), func(dst, msg []byte) ([]byte, error) { return c.Response(Blocking(ctx), dst, msg) }); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// exchange has x serve a request by requests of its own. The client gets the headers and trailers
// of the last one, or of the last one that failed.
func (m *Method) exchange(ctx context.Context, ss grpc.ServerStream, to *upstream.Cluster, in *rpc.Message, x Exchanger) (*rpc.Message, error) {
	s := &sender{ctx: ctx, to: to}
	response, err := x.exchange(ctx, in.Data.Materialize(), s.send)
	if serr := s.last(err).set(ss); err == nil {
		err = serr
	}
	if err != nil {
		return nil, err
	}
	return rpc.NewMessage(response), nil
}

// sender sends the requests that a call needs, and keeps what came around their responses.
type sender struct {
	ctx       context.Context // the client's
	to        *upstream.Cluster
	good, bad responseMetadata
}

// responseMetadata is the metadata of a response of etcd's.
type responseMetadata struct{ header, trailer metadata.MD }

func (md responseMetadata) empty() bool { return len(md.header) == 0 && len(md.trailer) == 0 }

// set hands the metadata to the client.
func (md responseMetadata) set(ss grpc.ServerStream) error {
	if len(md.trailer) > 0 {
		ss.SetTrailer(md.trailer)
	}
	if len(md.header) > 0 {
		return ss.SetHeader(md.header)
	}
	return nil
}

// send is a sendFunc.
func (s *sender) send(ctx context.Context, method string, msg []byte, limit int) ([]byte, error) {
	var metadata responseMetadata
	out := new(rpc.Message)
	defer out.Free()
	conn := s.to.Acquire()
	defer conn.Release()
	err := conn.Conn.Invoke(upstream.OutgoingContext(ctx), method, rpc.NewMessage(msg), out, grpc.Header(&metadata.header), grpc.Trailer(&metadata.trailer), grpc.MaxCallRecvMsgSize(limit))
	if err != nil {
		s.bad = metadata
		return nil, ended(s.ctx, err, metadata)
	}
	s.good = metadata
	return out.Data.Materialize(), nil
}

// last is what came around the last response, or around the last one that failed.
func (s *sender) last(err error) responseMetadata {
	if err != nil {
		return s.bad
	}
	return s.good
}

// ended returns the status for a call that ended with err: the proxy's own if the proxy has ended
// it or etcd was never reached, and else etcd's, as it came. Whatever etcd answers has headers or
// trailers, a content type at the least.
func ended(ctx context.Context, err error, metadata responseMetadata) error {
	if cause := ownCause(ctx); cause != nil {
		return cause
	}
	if metadata.empty() {
		if st := status.Convert(err); st.Code() == codes.Unavailable {
			return rpc.Error(codes.Unavailable, "etcd is unreachable: "+st.Message())
		}
	}
	return err
}

// ownCause is the status for which the proxy itself has ended a call, and nil if it has not.
func ownCause(ctx context.Context) error {
	cause := context.Cause(ctx)
	if _, ok := errors.AsType[grpcError](cause); ok {
		return cause
	}
	return nil
}

// servedByLearner reports whether a learner serves a call. in is the request of a unary call, and
// nil for a stream.
func (m *Method) servedByLearner(in *rpc.Message) bool {
	switch m.Path {
	case pb.Maintenance_Status_FullMethodName, pb.Maintenance_Snapshot_FullMethodName:
		return true
	case pb.KV_Range_FullMethodName:
		var r pb.RangeRequest
		return proto.Unmarshal(in.Data.Materialize(), &r) == nil && r.Serializable
	}
	return false
}
