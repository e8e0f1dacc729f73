package proxy

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
)

// grpcOverhead is what etcd adds to its limit on requests to get gRPC's limit on messages, in bytes.
const grpcOverhead = 512 * 1024

// api is etcd's API as the proxy serves it: the method table with the handlers of its methods. The
// engine relays the frames of most calls itself; every other call is handled by a plain function, on
// the stream interface of grpc-go. The JSON gateway and etcd's own Election and Lock services call
// the same handlers through a [localConn].
type api struct {
	core         *core
	log          *slog.Logger
	denials      *denials
	unknown      prometheus.Counter
	methods      map[string]*method // by path
	services     map[string]bool
	coordination *coordination

	draining context.Context // ended by drain
	drain    context.CancelCauseFunc
	running  sync.WaitGroup // the goroutines of streams
	unary    atomic.Uint64  // calls so far
}

func newAPI(c *core, u *upstream, m *metrics, log *slog.Logger, d *denials) *api {
	a := &api{core: c, log: log, denials: d, unknown: m.unknown(), methods: make(map[string]*method), services: make(map[string]bool)}
	a.draining, a.drain = context.WithCancelCause(context.Background())
	for _, row := range methodTable() {
		kind := [...]string{shapeUnary: "unary", shapeServerStream: "server_stream", shapeBidiStream: "bidi_stream"}[row.shape]
		row.api, row.metrics, row.relayed = a, m.of(kind, row.service, row.name), row.relays()
		a.methods[row.full], a.services[row.service] = row, true
	}
	a.coordination = newCoordination(a, u)
	return a
}

// stop ends the calls of the Election and Lock services, and those that wait for events.
func (a *api) stop() {
	a.drain(errShuttingDown)
	a.coordination.close()
}

// lookup returns the method at a path. A method outside the table is answered with etcd's own text.
func (a *api) lookup(path string) (*method, error) {
	if m := a.methods[path]; m != nil {
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

// authorize returns the error for a client that may not call a method at all.
func (a *api) authorize(id *Identity, m *method) error {
	if id.Denied {
		return a.deny(id)
	}
	if !id.mayCall(m) {
		return errReadOnly
	}
	return nil
}

// deny returns the error for a client that is not allowed.
func (a *api) deny(id *Identity) error {
	a.denials.note(id)
	return ownError(codes.PermissionDenied, fmt.Sprintf("client %q is not allowed here", id.name()))
}

// gateOpen reports whether calls need not wait for the gate.
func (a *api) gateOpen() bool {
	if a.core.gate == nil {
		return true
	}
	select {
	case <-a.core.gate:
		return true
	default:
		return false
	}
}

// handle serves a call of an authorized client, whose messages are frames. The error is the status
// for the client. It returns once the call is over.
func (m *method) handle(id *Identity, ss grpc.ServerStream) error {
	if m.shape == shapeUnary {
		return m.handleUnary(id, ss)
	}
	m.metrics.started.Inc()
	err := statusError(m.handleStream(id, ss))
	m.metrics.end(status.Code(err))
	return err
}

// statusError is what grpc-go's server makes of the error of a handler.
func statusError(err error) error {
	if st, ok := status.FromError(err); ok {
		return st.Err()
	}
	return status.FromContextError(err).Err()
}

// newCall makes the call's rewriter, nil if it has none.
func (m *method) newCall(id *Identity) call {
	if m.call == nil {
		return nil
	}
	return m.call(m.api.core, id)
}
