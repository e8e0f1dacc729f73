package proxy

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/experimental"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// engine moves messages between identified connections and etcd.
type engine interface {
	// serve takes over conn and returns at once.
	serve(conn *clientConn)
	// run moves messages until ctx ends. Then it drains: it asks clients to go elsewhere, ends the calls that wait for events with Unavailable,
	// lets the others finish, and after the drain timeout ends what is left.
	run(ctx context.Context) error
	// close lets go of what an engine holds that never ran. It may be called more than once.
	close()
}

// grpcOverhead is what etcd adds to its limit on requests to get gRPC's limit on messages, in bytes.
const grpcOverhead = 512 * 1024

// grpcEngine is the reference engine, on grpc-go.
type grpcEngine struct {
	core         *core
	log          *slog.Logger
	denials      *denials
	server       *grpc.Server
	hosted       *hosted
	conns        *connQueue
	drainTimeout time.Duration
	unknown      prometheus.Counter
	methods      map[string]map[string]bool // service → methods, for the texts about unknown ones
	served       []*grpcMethod

	draining context.Context
	drain    context.CancelCauseFunc
	pumps    sync.WaitGroup // the goroutines that read from clients
	unary    atomic.Uint64  // calls so far
}

var _ engine = (*grpcEngine)(nil)

func newGRPCEngine(c *core, u *upstream, m *metrics, log *slog.Logger, d *denials, drainTimeout time.Duration) (*grpcEngine, error) {
	e := &grpcEngine{
		core: c, log: log, denials: d, drainTimeout: drainTimeout,
		conns:   newConnQueue(),
		unknown: m.unknown(),
		methods: make(map[string]map[string]bool),
	}
	e.draining, e.drain = context.WithCancelCause(context.Background())
	e.server = grpc.NewServer(
		grpc.Creds(identityCredentials{}),
		grpc.ForceServerCodecV2(rawCodec{}),
		experimental.BufferPool(buffers),
		grpc.WriteBufferSize(ioBuffer),
		grpc.UnknownServiceHandler(e.refuseUnknown),
		grpc.ConnectionTimeout(handshakeTimeout), // a drain waits for who has begun to connect
		// What follows is how etcd sets up its own server.
		grpc.MaxRecvMsgSize(c.maxRequest+grpcOverhead),
		grpc.MaxSendMsgSize(math.MaxInt32),
		grpc.MaxConcurrentStreams(math.MaxUint32),
		// etcd limits pings without TLS, and not with it. This server serves both, and lets nobody go
		// whom etcd would keep.
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 1, PermitWithoutStream: true}),
		grpc.KeepaliveParams(keepalive.ServerParameters{Time: 2 * time.Hour, Timeout: 20 * time.Second}),
		grpc.WaitForHandlers(true),
	)
	e.register(m)
	var err error
	if e.hosted, err = newHosted(e, u); err != nil {
		return nil, err
	}
	return e, nil
}

// register gives every row of the method table to the server, with its true shape.
func (e *grpcEngine) register(m *metrics) {
	services := make(map[string]*grpc.ServiceDesc)
	var order []string
	for _, row := range methodTable() {
		sd := services[row.service]
		if sd == nil {
			sd = &grpc.ServiceDesc{ServiceName: row.service, HandlerType: (*any)(nil)}
			services[row.service] = sd
			order = append(order, row.service)
			e.methods[row.service] = make(map[string]bool)
		}
		e.methods[row.service][row.name] = true
		h := &grpcMethod{engine: e, method: row, metrics: m.of(row), stream: row.streamDesc()}
		e.served = append(e.served, h)
		if row.shape == shapeUnary {
			sd.Methods = append(sd.Methods, grpc.MethodDesc{MethodName: row.name, Handler: h.serveUnary})
			continue
		}
		desc := row.streamDesc()
		desc.Handler = h.serveStream
		sd.Streams = append(sd.Streams, desc)
	}
	for _, name := range order {
		e.server.RegisterService(services[name], nil)
	}
}

// close implements engine.
func (e *grpcEngine) close() { e.hosted.stop() }

// serve implements engine.
func (e *grpcEngine) serve(conn *clientConn) { e.conns.put(conn) }

// run implements engine.
func (e *grpcEngine) run(ctx context.Context) error {
	served := make(chan error, 1)
	go func() { served <- e.server.Serve(e.conns) }()
	var services sync.WaitGroup
	services.Go(e.hosted.run)
	defer services.Wait()
	defer e.hosted.stop()
	var err error
	select {
	case err = <-served: // the queue never fails, so this is a broken invariant of grpc-go
		e.drain(errShuttingDown)
		e.server.Stop()
		e.pumps.Wait()
		return fmt.Errorf("serve gRPC: %w", err)
	case <-ctx.Done():
	}
	cut := make(chan struct{})
	hard := time.AfterFunc(e.drainTimeout, func() {
		defer close(cut)
		e.log.Warn("calls did not finish in time and were ended", "drainTimeout", e.drainTimeout)
		e.server.Stop()
	})
	stopped := make(chan struct{})
	go func() {
		defer close(stopped)
		e.server.GracefulStop()
	}()
	e.drain(errShuttingDown)
	<-stopped
	if !hard.Stop() {
		<-cut
	}
	<-served //nolint:errcheck // it was stopped, and its error says only that
	e.pumps.Wait()
	return nil
}

// refuseUnknown answers a method outside the table with etcd's own text.
func (e *grpcEngine) refuseUnknown(_ any, ss grpc.ServerStream) error {
	e.unknown.Inc()
	full, _ := grpc.MethodFromServerStream(ss)
	service, name := "", strings.TrimPrefix(full, "/")
	if i := strings.LastIndexByte(name, '/'); i >= 0 {
		service, name = name[:i], name[i+1:]
	}
	if e.methods[service] == nil {
		return status.Errorf(codes.Unimplemented, "unknown service %v", service)
	}
	return status.Errorf(codes.Unimplemented, "unknown method %v for service %v", name, service)
}

// grpcMethod serves one row of the method table.
type grpcMethod struct {
	*method
	engine  *grpcEngine
	metrics *methodMetrics
	stream  grpc.StreamDesc
}

// admit says who calls, and refuses a denied client, a method that the client may not call, and another
// proxy. in is the request of a unary call, and nil for a stream.
func (m *grpcMethod) admit(ctx context.Context, in *frame) (*Identity, error) {
	if err := refuseChained(ctx); err != nil {
		return nil, err
	}
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errNoIdentity
	}
	info, ok := p.AuthInfo.(identityInfo)
	if !ok {
		return nil, errNoIdentity
	}
	if info.id.Denied {
		m.engine.denials.note(info.id)
		return nil, ownError(codes.PermissionDenied, fmt.Sprintf("client %q is not allowed here", info.id.name()))
	}
	if !info.id.mayCall(m.method) {
		return nil, errReadOnly
	}
	return info.id, m.pass(ctx, info.id.to, in)
}

// pass waits for the gate, as long as calls wait for etcd. What a learner serves has a gate of its own; where that is all that is open, the rest is refused in the
// learner's words.
func (m *grpcMethod) pass(ctx context.Context, to *upstream, in *frame) error {
	e := m.engine
	gate := e.core.gate
	if gate == nil {
		return nil
	}
	select {
	case <-gate:
		return nil
	default:
	}
	timer := time.NewTimer(readyWait)
	defer timer.Stop()
	for learner := e.core.learnerGate; ; learner = nil {
		select {
		case <-gate:
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
		case <-e.draining.Done():
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

// newCall makes the call's rewriter, nil if it has none.
func (m *grpcMethod) newCall(id *Identity) call {
	if m.call == nil {
		return nil
	}
	return m.call(m.engine.core, id)
}

func (m *grpcMethod) serveUnary(_ any, ctx context.Context, decode func(any) error, _ grpc.UnaryServerInterceptor) (any, error) {
	m.metrics.started.Inc()
	in := new(frame)
	if err := decode(in); err != nil {
		m.metrics.end(status.Code(err))
		return nil, err
	}
	m.metrics.received.Inc()
	out, err := m.forward(ctx, in)
	m.metrics.end(status.Code(err))
	if err != nil {
		return nil, err
	}
	m.metrics.sent.Inc()
	return out, nil
}

// forward moves one request and its answer, all in the handler's goroutine. It owns in.
func (m *grpcMethod) forward(ctx context.Context, in *frame) (*frame, error) {
	defer in.free()
	watch := stopwatch{on: sampled(m.engine.unary.Add(1) - 1)}
	watch.start()
	id, err := m.admit(ctx, in)
	if err != nil {
		return nil, err
	}
	c := m.newCall(id)
	if c != nil {
		if err := in.edit(ctx, c.request); err != nil {
			return nil, err
		}
	}
	if m.waits {
		var cancel context.CancelCauseFunc
		ctx, cancel = context.WithCancelCause(ctx)
		defer cancel(nil)
		defer context.AfterFunc(m.engine.draining, func() { cancel(errShuttingDown) })()
	}
	watch.stop()
	id.to.await(ctx)
	if x, ok := c.(exchanger); ok && x.exchanges() {
		return m.exchange(ctx, id.to, in, x) // several calls of etcd: not measured
	}
	out := new(frame)
	var header, trailer metadata.MD
	lane := m.engine.to(c, id)
	defer lane.done()
	err = lane.conn.Invoke(upstreamContext(ctx), m.full, in, out, grpc.Header(&header), grpc.Trailer(&trailer), grpc.ForceCodecV2(rawCodec{}))
	if watch.start(); len(header)+len(trailer) > 0 { // etcd has answered
		defer watch.observe(m.metrics.added)
	}
	if len(header) > 0 {
		if err := grpc.SetHeader(ctx, header); err != nil {
			return nil, err
		}
	}
	if len(trailer) > 0 {
		if err := grpc.SetTrailer(ctx, trailer); err != nil {
			return nil, err
		}
	}
	if err != nil {
		return nil, ended(ctx, err, header, trailer)
	}
	if c != nil && c.scans() {
		replace := out.replace
		if c.parts() {
			replace = out.replaceParts
		}
		if err := replace(ctx, c.response); err != nil {
			out.free()
			return nil, err
		}
	}
	return out, nil
}

// to is where a call goes on: etcd, or a service of etcd's that is run here. The caller says when it is done.
func (e *grpcEngine) to(c call, id *Identity) *lane {
	if own, ok := c.(*electionCall); ok && own.hosted {
		return e.hosted.take()
	}
	return id.to.take()
}

// exchange has x serve a request by requests of its own. The client gets the headers and trailers of the last one, or of the last one that failed.
func (m *grpcMethod) exchange(ctx context.Context, to *upstream, in *frame, x exchanger) (*frame, error) {
	a := &asking{ctx: ctx, to: to}
	answer, err := x.exchange(ctx, in.data.Materialize(), a.ask)
	last := a.last(err)
	if serr := grpc.SetHeader(ctx, last.header); err == nil {
		err = serr
	}
	if serr := grpc.SetTrailer(ctx, last.trailer); err == nil {
		err = serr
	}
	if err != nil {
		return nil, err
	}
	return &frame{data: mem.BufferSlice{mem.SliceBuffer(answer)}}, nil
}

// asking sends the requests that a call needs, and keeps what came around their answers.
type asking struct {
	ctx       context.Context // the client's
	to        *upstream
	good, bad around
}

type around struct{ header, trailer metadata.MD }

// ask is an asker.
func (a *asking) ask(ctx context.Context, method string, msg []byte, limit int) ([]byte, error) {
	var met around
	out := new(frame)
	defer out.free()
	sent := &frame{data: mem.BufferSlice{mem.SliceBuffer(msg)}}
	lane := a.to.take()
	defer lane.done()
	err := lane.conn.Invoke(upstreamContext(ctx), method, sent, out, grpc.Header(&met.header), grpc.Trailer(&met.trailer), grpc.MaxCallRecvMsgSize(limit))
	if err != nil {
		a.bad = met
		return nil, ended(a.ctx, err, met.header, met.trailer)
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
func ended(ctx context.Context, err error, header, trailer metadata.MD) error {
	if cause := context.Cause(ctx); cause != nil {
		var own interface{ GRPCStatus() *status.Status }
		if errors.As(cause, &own) {
			return cause
		}
	}
	if len(header) == 0 && len(trailer) == 0 {
		if st := status.Convert(err); st.Code() == codes.Unavailable {
			return ownError(codes.Unavailable, "etcd is unreachable: "+st.Message())
		}
	}
	return err
}

// upstreamContext carries the client's metadata on to etcd, and says that etcd is who it is for. What belongs to the hop stays behind: gRPC writes its own; pseudo headers, content
// type, user agent and timeout are left out by grpc-go itself.
func upstreamContext(ctx context.Context) context.Context {
	md, ok := metadata.FromIncomingContext(ctx)
	if !ok {
		md = make(metadata.MD, 1)
	}
	for k := range md {
		switch k {
		case "grpc-accept-encoding", "grpc-encoding", "grpc-timeout", "grpc-status", "grpc-message", "grpc-status-details-bin",
			"te", "connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "host", "accept-encoding":
			delete(md, k)
		}
	}
	md[meantForEtcd] = markOfEtcd
	return metadata.NewOutgoingContext(ctx, md)
}
