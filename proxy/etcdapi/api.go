package etcdapi

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/metrics"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// GrpcOverhead is what etcd adds to its limit on requests to get gRPC's limit on messages, in
// bytes.
const GrpcOverhead = 512 * 1024

// API is etcd's API as the proxy serves it: the method table with the handlers of its methods. The
// engine relays the frames of most calls itself; every other call is handled by a plain function,
// on the stream interface of grpc-go. The JSON gateway and etcd's own Election and Lock services
// call the same handlers through a [LocalConn].
type API struct {
	Core           *Core
	log            *slog.Logger
	denials        *listener.Denials
	unknown        prometheus.Counter
	methods        map[string]*Method // by path
	services       map[string]bool
	hostedServices *hostedServices

	draining context.Context // ended by drain
	Drain    context.CancelCauseFunc
	Running  sync.WaitGroup // the goroutines of streams
	unary    atomic.Uint64  // calls so far
}

// New makes the API. Calls that it handles go to the cluster of their client, and those that the
// Election and Lock services make go to u.
func New(c *Core, u *upstream.Cluster, m *metrics.Metrics, log *slog.Logger, d *listener.Denials) *API {
	a := &API{Core: c, log: log, denials: d, unknown: m.UnknownMethod(), methods: make(map[string]*Method), services: make(map[string]bool)}
	a.draining, a.Drain = context.WithCancelCause(context.Background())
	for _, row := range MethodTable() {
		kind := [...]string{ShapeUnary: "unary", ShapeServerStream: "server_stream", ShapeBidiStream: "bidi_stream"}[row.Shape]
		row.api, row.Metrics, row.Relayed = a, m.ForMethod(kind, row.service, row.name), row.relays()
		a.methods[row.Path], a.services[row.service] = row, true
	}
	a.hostedServices = newHostedServices(a, u)
	return a
}

// Stop ends the calls of the Election and Lock services, and those that wait for events.
func (a *API) Stop() {
	a.Drain(ErrShuttingDown)
	a.hostedServices.Close()
}

// Method returns the method at a path, or nil.
func (a *API) Method(path string) *Method { return a.methods[path] }

// Lookup returns the method at a path. A method outside the table is answered with etcd's own text.
func (a *API) Lookup(path string) (*Method, error) {
	if m := a.Method(path); m != nil {
		return m, nil
	}
	rest, ok := strings.CutPrefix(path, "/")
	i := strings.LastIndexByte(rest, '/')
	if !ok || i < 0 {
		return nil, status.Errorf(codes.Unimplemented, "malformed method name: %q", path)
	}
	a.unknown.Inc()
	service, name := rest[:i], rest[i+1:]
	if !a.services[service] {
		return nil, status.Errorf(codes.Unimplemented, "unknown service %v", service)
	}
	return nil, status.Errorf(codes.Unimplemented, "unknown method %v for service %v", name, service)
}

// Authorize returns the error for a client that may not call a method at all.
func (a *API) Authorize(id *listener.Identity, m *Method) error {
	if id.Denied {
		return a.Deny(id)
	}
	if !m.allows(id) {
		return errReadOnly
	}
	return nil
}

// Deny returns the error for a client that is not allowed.
func (a *API) Deny(id *listener.Identity) error {
	a.denials.Note(id)
	return rpc.Error(codes.PermissionDenied, fmt.Sprintf("client %q is not allowed here", id.Name()))
}

// GateOpen reports whether calls need not wait for the gate.
func (a *API) GateOpen() bool {
	if a.Core.Gate == nil {
		return true
	}
	select {
	case <-a.Core.Gate:
		return true
	default:
		return false
	}
}

// Handle serves a call of an authorized client, whose messages are frames. The error is the status
// for the client. It returns once the call is over.
func (m *Method) Handle(id *listener.Identity, ss grpc.ServerStream) error {
	if m.Shape == ShapeUnary {
		return m.handleUnary(id, ss)
	}
	m.Metrics.Started.Inc()
	err := statusError(m.handleStream(id, ss))
	m.Metrics.End(status.Code(err))
	return err
}

// statusError is what grpc-go's server makes of the error of a handler.
func statusError(err error) error {
	if st, ok := status.FromError(err); ok {
		return st.Err()
	}
	return status.FromContextError(err).Err()
}

// newCall makes the rewriter of a call.
type newCall func(c *Core, id *listener.Identity, memory *CallMemory) Call

// CallMemory is the memory for the rewriter of one call, if it is one of the most frequent methods.
type CallMemory struct {
	rangeCall  rangeCall
	putCall    putCall
	deleteCall deleteCall
	txnCall    txnCall
	request    *[]byte // of [rpc.Buffers], for the request as etcd gets it; nil if it was not needed
}

// headroom is how much longer a request with encrypted values may be than that of the client
// without another allocation, in bytes.
const headroom = 1024

// requestBuffer returns the memory for a request that takes the place of one of n bytes.
func (m *CallMemory) requestBuffer(n int) []byte {
	if m.request == nil || len(*m.request) < n+headroom {
		m.request = rpc.Buffers.Get(n + headroom)
	}
	return (*m.request)[:0:len(*m.request)]
}

// freeRequest gives the memory back of a request that is not sent.
func (m *CallMemory) freeRequest() {
	if b := m.TakeRequest(); b != nil {
		rpc.Buffers.Put(b)
	}
}

// TakeRequest hands over the memory that the last result of [Call.Request] is in, for
// [rpc.Buffers]. It returns nil if the result has none of it.
func (m *CallMemory) TakeRequest() *[]byte {
	taken := m.request
	m.request = nil
	return taken
}

// NewCall makes the call's rewriter, nil if it has none. The rewriter may be a part of memory.
func (m *Method) NewCall(id *listener.Identity, memory *CallMemory) Call {
	if m.call == nil {
		return nil
	}
	return m.call(m.api.Core, id, memory)
}
