package relay

import (
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/metrics"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// session is a client's connection with its connections to etcd. It implements [http2conn.Handler]
// for the former.
type session struct {
	engine *Engine
	id     *listener.Identity
	secure bool // the client's connection is over TLS
	client *http2conn.Conn
	conns  atomic.Pointer[[]*http2conn.Conn] // to flush; replaced under mu
	work   sync.WaitGroup                    // goroutines of the session

	admission admission
	// Of the goroutine that reads from the client.
	unary   uint64 // calls so far
	headers repeatedHeaders
	memory  streamMemory

	mu           sync.Mutex
	endpoints    []*endpointState
	nextEndpoint int           // index into endpoints, round robin
	changed      chan struct{} // closed when an endpoint has connected or disconnected
	ended        bool
}

// minPingInterval is the minimum ping interval that etcd asks of its clients without TLS.
const minPingInterval = 5 * time.Second

func newSession(e *Engine, conn *listener.Conn) *session {
	s := &session{engine: e, id: conn.Identity, secure: !conn.Plaintext, changed: make(chan struct{})}
	s.admission.all = &e.calls
	cfg := http2conn.Config{
		Handler: s, Pool: rpc.Buffers, WriteBuffer: conn.WriteBuffer, Plaintext: conn.Plaintext, HandshakeTimeout: listener.HandshakeTimeout, KeepaliveTime: 2 * time.Hour, KeepaliveTimeout: 20 * time.Second, PermitWithoutStream: true, Budget: e.budget, BeforeRead: s.admission.pause, NewStream: s.newStream,
	}
	// etcd serves gRPC over TLS by net/http, and without TLS by grpc-go.
	if conn.Plaintext {
		cfg.MinPingInterval = minPingInterval
	} else {
		cfg.Strict = true
	}
	s.client = http2conn.NewServer(conn, cfg)
	s.conns.Store(&[]*http2conn.Conn{s.client})
	for i, endpoint := range s.id.Upstream.Endpoints {
		s.endpoints = append(s.endpoints, &endpointState{url: endpoint, index: i})
	}
	return s
}

// run serves the connection to its end.
func (s *session) run() {
	_ = s.client.Serve() // how a client leaves is its own affair
	s.admission.Close()
	for _, stream := range s.client.Streams() {
		if st, ok := stream.Value().(*clientStream); ok {
			st.clientGone()
		}
	}
	s.mu.Lock()
	s.ended = true
	conns := *s.conns.Load()
	s.mu.Unlock()
	for _, c := range conns {
		c.Close()
	}
	s.work.Wait()
}

// add notes a connection that is to be flushed with the others. The caller holds mu.
func (s *session) add(c *http2conn.Conn) {
	all := append(slices.Clone(*s.conns.Load()), c)
	s.conns.Store(&all)
}

// notifyChanged wakes those who wait for a connection. The caller holds mu.
func (s *session) notifyChanged() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// flush writes what has gathered on all connections, and what that makes way for.
func (s *session) flush() {
	for again := true; again; {
		again = false
		for _, c := range *s.conns.Load() {
			if c.NeedsFlush() {
				c.Flush()
				again = true
			}
		}
	}
}

// drain asks the client to go elsewhere, and ends the relayed calls that wait for events. The
// handler of a handled one ends it.
func (s *session) drain() {
	s.client.GracefulShutdown()
	for _, stream := range s.client.Streams() {
		if st, ok := stream.Value().(*clientStream); ok && st.indefinite.Load() && st.handler() == nil {
			st.fail(etcdapi.ErrShuttingDown)
		}
	}
	s.flush()
}

// Headers implements [http2conn.Handler]. A client that is not allowed is answered here, from its
// header fields alone.
func (s *session) Headers(stream *http2conn.Stream, fields []hpack.HeaderField, end bool) {
	repeated, h := s.requestHead(fields)
	st := stream.Value().(*clientStream)
	st.fields, st.repeated, st.responseType = fields, repeated, h.responseType()
	st.timeout = h.timeoutField
	st.response.stream = st
	if s.secure && !h.grpcLike {
		serveWeb(st, end)
		return
	}
	httpStatus, err := h.invalid()
	if h.connection && httpStatus != http.StatusBadRequest {
		st.finish(codes.Internal)
		stream.Reset(http2.ErrCodeProtocol)
		return
	}
	if err != nil {
		st.refuse(httpStatus, err)
		return
	}
	if repeated != nil {
		st.method = repeated.method
	}
	if st.method == nil {
		st.method, err = s.engine.api.Lookup(h.path)
	}
	if err == nil {
		err = s.engine.api.Authorize(s.id, st.method)
	}
	if err == nil && h.fromProxy {
		err = upstream.ErrChained
	}
	switch {
	case err != nil:
		st.fail(err)
	case !st.method.Relayed || !h.relayable() || !s.engine.api.GateOpen():
		handle(st, &h, nil, end)
	default:
		if st.method.Shape == etcdapi.ShapeUnary {
			st.watch.On = metrics.Sampled(s.unary)
			st.watch.Start()
			s.unary++
		}
		st.begin(end)
	}
}

// Data implements [http2conn.Handler].
func (s *session) Data(stream *http2conn.Stream, data []byte, end bool) {
	if st, ok := stream.Value().(*clientStream); ok {
		st.fromClient(data, end)
	}
}

// Reset implements [http2conn.Handler].
func (s *session) Reset(stream *http2conn.Stream, _ http2.ErrCode) {
	if st, ok := stream.Value().(*clientStream); ok {
		st.clientGone()
	}
}

// Writable implements [http2conn.Handler]: what etcd has sent for the stream is on its way.
func (s *session) Writable(stream *http2conn.Stream) {
	if st, ok := stream.Value().(*clientStream); ok {
		if h := st.handler(); h != nil {
			h.drained()
		} else {
			st.consumedFromUpstream()
		}
	}
}

// SettingsReceived implements [http2conn.Handler].
func (s *session) SettingsReceived() {}

// GoAwayReceived implements [http2conn.Handler].
func (s *session) GoAwayReceived() {}

// FlushNeeded implements [http2conn.Handler].
func (s *session) FlushNeeded() { s.flush() }
