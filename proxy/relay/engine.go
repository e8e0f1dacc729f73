package relay

import (
	"context"
	"log/slog"
	"net/http"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// Engine serves the connections of clients that speak HTTP/2. It relays the frames of most calls
// between a client's connection and connections to etcd that belong to this client, one to each
// endpoint. Handlers of package etcdapi serve all other calls: methods that need decoded messages,
// compressed messages, requests that etcd's clients do not send, and calls while etcd is not
// connected. Over TLS a connection also carries web requests.
type Engine struct {
	api          *etcdapi.API
	log          *slog.Logger
	drainTimeout time.Duration
	maxMessage   int          // of a client's messages, in bytes
	web          http.Handler // of requests that are not gRPC's
	budget       *http2conn.Budget
	denied       deniedConns
	calls        atomic.Int64    // see [admission]
	base         context.Context // of everything that waits; it ends with the engine
	cancel       context.CancelFunc

	draining atomic.Bool // draining has begun
	mu       sync.Mutex
	sessions map[*session]struct{}
	closed   bool
	empty    chan struct{} // closed once draining and without sessions
	all      sync.WaitGroup
}

// New makes an engine for the calls of an API. web serves the requests that are not gRPC's, and
// drain bounds how long calls may take after [Engine.Drain].
func New(a *etcdapi.API, web http.Handler, drain time.Duration, log *slog.Logger) *Engine {
	e := &Engine{api: a, maxMessage: a.Core.MaxRequest + etcdapi.GrpcOverhead, log: log, drainTimeout: drain, web: web, budget: http2conn.NewBudget(requestBudget()), sessions: make(map[*session]struct{}), empty: make(chan struct{})}
	e.base, e.cancel = context.WithCancel(context.Background())
	return e
}

// requestBudget is how many bytes of unfinished requests the proxy holds at most: a quarter of the
// memory limit of the process, if there is one.
func requestBudget() int64 {
	const most = 128 << 20
	return min(most, debug.SetMemoryLimit(-1)/4)
}

// Serve takes over conn and returns at once.
func (e *Engine) Serve(conn *listener.Conn) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.closed {
		_ = conn.Close()
		return
	}
	s := newSession(e, conn)
	e.sessions[s] = struct{}{}
	if s.id.Denied {
		e.denied.add(s)
	}
	e.all.Go(func() {
		s.run()
		if s.id.Denied {
			e.denied.remove(s)
		}
		if socket := s.client.Detached(); socket != nil {
			e.all.Go(func() { e.denied.wait(socket) }) // with a small stack
		}
		e.mu.Lock()
		defer e.mu.Unlock()
		if delete(e.sessions, s); e.closed && len(e.sessions) == 0 {
			close(e.empty)
		}
	})
}

// Drain asks all clients to go elsewhere, ends the calls that wait for events with Unavailable,
// lets the others finish, and returns once they have, or once the drain timeout is over.
func (e *Engine) Drain() {
	e.draining.Store(true)
	e.denied.end()
	e.api.Drain(etcdapi.ErrShuttingDown)
	e.mu.Lock()
	e.closed = true
	all := make([]*session, 0, len(e.sessions))
	for s := range e.sessions {
		all = append(all, s)
	}
	if len(all) == 0 {
		close(e.empty)
	}
	e.mu.Unlock()
	for _, s := range all {
		e.all.Go(s.drain)
	}
	timer := time.NewTimer(e.drainTimeout)
	defer timer.Stop()
	select {
	case <-e.empty:
	case <-timer.C:
		e.log.Warn("calls did not finish in time and were ended", "drainTimeout", e.drainTimeout)
	}
}

// Close ends what is left. It may be called more than once, also for an engine that never ran.
func (e *Engine) Close() {
	e.cancel()
	e.denied.end()
	e.mu.Lock()
	e.closed = true
	for s := range e.sessions {
		go s.client.Close() // over TLS it may take a moment, and each waits for its own
	}
	e.mu.Unlock()
	e.all.Wait()
}

// upstreamFields returns the header fields for etcd of a client's header fields. It omits those of
// the connection, and grpc-timeout, which is sent separately.
func upstreamFields(fields []hpack.HeaderField, scheme, authority string) []hpack.HeaderField {
	kept := make([]hpack.HeaderField, 0, len(fields)+1)
	for _, f := range fields {
		switch f.Name {
		case ":scheme":
			f.Value = scheme
		case ":authority":
			f.Value = authority
		case timeoutName, "grpc-encoding", "grpc-accept-encoding", "accept-encoding", "host", "content-length":
			continue
		}
		kept = append(kept, f)
	}
	return append(kept, hpack.HeaderField{Name: upstream.MarkHeader, Value: upstream.MarkValue[0]})
}
