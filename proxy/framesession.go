package proxy

import (
	"net/http"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/codes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// session is a client's connection with the connections that serve it. It is the handler of the former: see [http2conn.Handler] for who calls what.
type session struct {
	engine *engine
	id     *Identity
	secure bool // the client's connection is over TLS
	client *http2conn.Conn
	conns  atomic.Pointer[[]*http2conn.Conn] // all there are; replaced under mu
	work   sync.WaitGroup                    // what must end before the session does

	admission admission
	unary     uint64 // calls so far; of the goroutine that reads from the client

	mu      sync.Mutex
	hops    []*hop
	turn    int           // whose turn it is
	changed chan struct{} // closed when a hop has come up or down
	ended   bool
}

// minPingInterval is the minimum ping interval that etcd asks of its clients without TLS.
const minPingInterval = 5 * time.Second

func newSession(e *engine, conn *clientConn) *session {
	s := &session{engine: e, id: conn.id, secure: !conn.plain, changed: make(chan struct{})}
	s.admission.all = &e.calls
	cfg := http2conn.Config{
		Handler: s, Pool: buffers, WriteBuffer: conn.outlet, Plaintext: conn.plain, HandshakeTimeout: handshakeTimeout, KeepaliveTime: 2 * time.Hour, KeepaliveTimeout: 20 * time.Second, PermitWithoutStream: true, Budget: e.budget, BeforeRead: s.admission.pause,
	}
	// etcd serves gRPC over TLS by net/http, and without TLS by grpc-go.
	if conn.plain {
		cfg.MinPingInterval = minPingInterval
	} else {
		cfg.Strict = true
	}
	s.client = http2conn.NewServer(conn, cfg)
	s.conns.Store(&[]*http2conn.Conn{s.client})
	for _, endpoint := range s.id.to.endpoints {
		s.hops = append(s.hops, &hop{endpoint: endpoint})
	}
	return s
}

// run serves the connection to its end.
func (s *session) run() {
	_ = s.client.Serve() // how a client leaves is its own affair
	s.admission.close()
	for _, stream := range s.client.Streams() {
		if st, ok := stream.Value().(*fstream); ok {
			st.left()
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

// tell wakes those who wait for a connection. The caller holds mu.
func (s *session) tell() {
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

// leave asks the client to go elsewhere, and ends the relayed calls that wait for events. The handler
// of a handled one ends it.
func (s *session) leave() {
	s.client.GracefulShutdown()
	for _, stream := range s.client.Streams() {
		if st, ok := stream.Value().(*fstream); ok && st.method != nil && st.method.waits && st.handler() == nil {
			st.fail(errShuttingDown)
		}
	}
	s.flush()
}

// Headers implements [http2conn.Handler]. A client that is not allowed is answered here, from its
// header fields alone.
func (s *session) Headers(stream *http2conn.Stream, fields []hpack.HeaderField, end bool) {
	h := readHead(fields)
	st := &fstream{session: s, client: stream, fields: fields, responseType: h.responseType()}
	stream.SetValue(st)
	if s.secure && !h.grpcLike {
		st.serveWeb(end)
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
	if st.method, err = s.engine.api.lookup(h.path); err == nil {
		err = s.engine.api.authorize(s.id, st.method)
	}
	if err == nil && h.fromProxy {
		err = errChained
	}
	switch {
	case err != nil:
		st.fail(err)
	case !st.method.relayed || !h.plain() || !s.engine.api.gateOpen():
		st.handle(&h, nil, end)
	default:
		if st.method.shape == shapeUnary {
			st.watch.on = sampled(s.unary)
			st.watch.start()
			s.unary++
		}
		st.begin(end)
	}
}

// Data implements [http2conn.Handler].
func (s *session) Data(stream *http2conn.Stream, data []byte, end bool) {
	if st, ok := stream.Value().(*fstream); ok {
		st.in(data, end)
	}
}

// Reset implements [http2conn.Handler].
func (s *session) Reset(stream *http2conn.Stream, _ http2.ErrCode) {
	if st, ok := stream.Value().(*fstream); ok {
		st.left()
	}
}

// Writable implements [http2conn.Handler]: what etcd has sent for the stream is on its way.
func (s *session) Writable(stream *http2conn.Stream) {
	if st, ok := stream.Value().(*fstream); ok {
		if h := st.handler(); h != nil {
			h.sentAll()
		} else {
			st.creditUp()
		}
	}
}

// SettingsReceived implements [http2conn.Handler].
func (s *session) SettingsReceived() {}

// GoAwayReceived implements [http2conn.Handler].
func (s *session) GoAwayReceived() {}

// FlushNeeded implements [http2conn.Handler].
func (s *session) FlushNeeded() { s.flush() }
