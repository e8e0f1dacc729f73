package proxy

import (
	"context"
	"net"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/test/bufconn"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/h2"
)

// session is a client's connection with the connections that serve it. It is the handler of the former: see [h2.Handler] for who calls what.
type session struct {
	engine *frameEngine
	id     *Identity
	conn   *clientConn
	client *h2.Conn
	conns  atomic.Pointer[[]*h2.Conn] // all there are; replaced under mu
	work   sync.WaitGroup             // what must end before the session does

	mu      sync.Mutex
	hops    []*hop
	turn    int           // whose turn it is
	local   *h2.Conn      // to the reference engine; nil before it is needed
	changed chan struct{} // closed when a hop has come up or down
	ended   bool
}

// hop is one of etcd's endpoints, as one session sees it. Its fields are under the session's mu.
type hop struct {
	endpoint string
	conn     *h2.Conn // nil while there is none
	dialing  bool
	pause    time.Duration // after the last failure
	again    time.Time     // no sooner is it dialed
}

// keepaliveSilence and keepalivePatience are how the reference engine finds out that etcd has gone without a word.
const (
	keepaliveSilence  = 15 * time.Second
	keepalivePatience = 10 * time.Second
)

// referenceIdle is how long a connection to the reference engine stays without calls: few clients need it more than once.
const referenceIdle = 10 * time.Second

func newSession(e *frameEngine, conn *clientConn) *session {
	s := &session{engine: e, id: conn.id, conn: conn, changed: make(chan struct{})}
	s.client = h2.NewServer(conn, h2.Config{
		Handler: s, Pool: buffers, Vectors: vectors(conn.Conn), Greeting: handshakeTimeout, MinPing: 5 * time.Second, Silence: 2 * time.Hour, Patience: 20 * time.Second, Always: true,
	})
	s.conns.Store(&[]*h2.Conn{s.client})
	for _, endpoint := range s.id.to.endpoints {
		s.hops = append(s.hops, &hop{endpoint: endpoint})
	}
	return s
}

// vectors returns the connection itself where it is one of the system's.
func vectors(conn net.Conn) net.Conn {
	if s, ok := conn.(*sniffed); ok {
		conn = s.Conn
	}
	switch conn.(type) {
	case *net.TCPConn, *net.UnixConn:
		return conn
	}
	return nil
}

// run serves the connection to its end.
func (s *session) run() {
	_ = s.client.Serve() // how a client leaves is its own affair
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

// outlook is what there is to hope for where no connection takes a stream.
type outlook int

const (
	outlookFull    outlook = iota // there are connections, with as many streams as etcd allows
	outlookDown                   // there is none, and there was just none to be had
	outlookDialing                // one is under way
)

// pick returns the connection to etcd whose turn it is, or nil. Those that are down are dialed meanwhile: a client that asks for nothing costs etcd no connection.
func (s *session) pick() (*h2.Conn, *hop, outlook) {
	s.mu.Lock()
	defer s.mu.Unlock()
	full, dialing := false, false
	for i := range s.hops {
		h := s.hops[(s.turn+i)%len(s.hops)]
		switch {
		case h.conn == nil:
			s.dial(h)
			dialing = dialing || h.dialing
		case h.conn.Takes():
			s.turn = (s.turn + i + 1) % len(s.hops)
			return h.conn, h, 0
		default:
			full = true
		}
	}
	switch {
	case full:
		return nil, nil, outlookFull
	case dialing:
		return nil, nil, outlookDialing
	}
	return nil, nil, outlookDown
}

// await is pick for who waits, up to readyWait, for a connection that is under way; and if patient for one to come.
func (s *session) await(ctx context.Context, patient bool) (*h2.Conn, *hop) {
	timer := time.NewTimer(readyWait)
	defer timer.Stop()
	again := time.NewTicker(reconnect.Backoff.BaseDelay)
	defer again.Stop()
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		conn, h, hope := s.pick()
		if conn != nil || hope == outlookFull || hope == outlookDown && !patient {
			return conn, h
		}
		select {
		case <-changed:
		case <-again.C:
		case <-timer.C:
			return nil, nil
		case <-ctx.Done():
			return nil, nil
		}
	}
}

// dial connects to an endpoint, unless that is under way or was tried just now. The caller holds mu.
func (s *session) dial(h *hop) {
	if h.dialing || s.ended || time.Now().Before(h.again) {
		return
	}
	h.dialing = true
	s.work.Go(func() {
		ctx, cancel := context.WithTimeout(s.engine.base, reconnect.MinConnectTimeout)
		conn, err := s.id.to.dialEndpoint(ctx, h.endpoint, protocolHTTP2)
		cancel()
		if err == nil {
			s.serveHop(h, conn)
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		h.failed()
		s.tell()
	})
}

// failed notes that a connection has not come about. The caller holds the session's mu.
func (h *hop) failed() {
	h.dialing = false
	h.pause = min(max(h.pause*8/5, reconnect.Backoff.BaseDelay), reconnect.Backoff.MaxDelay)
	h.again = time.Now().Add(h.pause)
}

// serveHop serves a connection to etcd to its end. Streams go there once etcd has greeted.
func (s *session) serveHop(h *hop, conn net.Conn) {
	up := &upside{session: s, hop: h}
	up.conn = h2.NewClient(conn, h2.Config{
		Handler: up, Pool: buffers, Greeting: reconnect.MinConnectTimeout, Silence: keepaliveSilence, Patience: keepalivePatience,
	})
	s.mu.Lock()
	ended := s.ended
	if !ended {
		s.add(up.conn)
	}
	s.mu.Unlock()
	if ended {
		up.conn.Close()
		return
	}
	s.serveUp(up)
}

// serveUp serves a connection that streams go on to.
func (s *session) serveUp(up *upside) {
	c := up.conn
	why := c.Serve()
	s.mu.Lock()
	up.forget()
	all := slices.DeleteFunc(slices.Clone(*s.conns.Load()), func(o *h2.Conn) bool { return o == c })
	s.conns.Store(&all)
	s.mu.Unlock()
	for _, stream := range c.Streams() {
		if st, ok := stream.Value().(*fstream); ok {
			st.lost(why)
		}
	}
	s.flush()
}

// add notes a connection that is to be flushed with the others. The caller holds mu.
func (s *session) add(c *h2.Conn) {
	all := append(slices.Clone(*s.conns.Load()), c)
	s.conns.Store(&all)
}

// tell wakes those who wait for a connection. The caller holds mu.
func (s *session) tell() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// reference returns the connection to the reference engine, and nil once there can be none.
func (s *session) reference() *h2.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended {
		return nil
	}
	if s.local != nil && s.local.Takes() {
		return s.local
	}
	l := bufconn.Listen(loopBuffer)
	defer l.Close() //nolint:errcheck // never fails
	accepted := make(chan net.Conn, 1)
	go func() {
		conn, _ := l.Accept() // it is dialed at once
		accepted <- conn
	}()
	near, err := l.Dial()
	if err != nil {
		return nil
	}
	far := <-accepted
	up := &upside{session: s}
	up.conn = h2.NewClient(near, h2.Config{Handler: up, Pool: buffers, Greeting: handshakeTimeout, Idle: referenceIdle})
	s.local = up.conn
	s.add(up.conn)
	s.work.Go(func() { s.engine.ref.serve(&clientConn{Conn: far, id: s.id, closed: func() {}}) })
	s.work.Go(func() { s.serveUp(up) })
	return up.conn
}

// flush writes what has gathered on all connections, and what that makes way for.
func (s *session) flush() {
	for again := true; again; {
		again = false
		for _, c := range *s.conns.Load() {
			if c.Dirty() {
				c.Flush()
				again = true
			}
		}
	}
}

// leave asks the client to go elsewhere, and ends the calls that wait for events. Those that go on to the reference engine are ended there.
func (s *session) leave() {
	s.client.Leave()
	for _, stream := range s.client.Streams() {
		if st, ok := stream.Value().(*fstream); ok && st.method != nil && st.method.waits && !st.isLocal() {
			st.fail(errShuttingDown)
		}
	}
	s.flush()
}

// Headers implements [h2.Handler].
func (s *session) Headers(stream *h2.Stream, fields []hpack.HeaderField, end bool) {
	st := &fstream{session: s, client: stream, fields: fields, method: s.engine.route(s.id, fields)}
	stream.SetValue(st)
	st.begin(end)
}

// Data implements [h2.Handler].
func (s *session) Data(stream *h2.Stream, data []byte, end bool) {
	if st, ok := stream.Value().(*fstream); ok {
		st.in(data, end)
	}
}

// Reset implements [h2.Handler].
func (s *session) Reset(stream *h2.Stream, _ http2.ErrCode) {
	if st, ok := stream.Value().(*fstream); ok {
		st.left()
	}
}

// Sent implements [h2.Handler]: what etcd has sent for the stream is on its way.
func (s *session) Sent(stream *h2.Stream) {
	if st, ok := stream.Value().(*fstream); ok {
		st.creditUp()
	}
}

// Greeted implements [h2.Handler].
func (s *session) Greeted() {}

// Leaving implements [h2.Handler].
func (s *session) Leaving() {}

// Idle implements [h2.Handler].
func (s *session) Idle() { s.flush() }

// upside is the handler of a connection that streams go on to.
type upside struct {
	session *session
	hop     *hop // nil for that to the reference engine
	conn    *h2.Conn
	greeted bool   // under the session's mu
	kept    []byte // what is being opened, as it came; of the goroutine that reads conn
}

var (
	_ h2.Handler = (*session)(nil)
	_ h2.Handler = (*upside)(nil)
)

// forget has new streams go elsewhere. The caller holds the session's mu.
func (u *upside) forget() {
	switch {
	case u.hop != nil && !u.greeted:
		u.hop.failed()
	case u.hop != nil && u.hop.conn == u.conn:
		u.hop.conn = nil
	case u.hop == nil && u.session.local == u.conn:
		u.session.local = nil
	}
	u.session.tell()
}

// Headers implements [h2.Handler].
func (u *upside) Headers(stream *h2.Stream, fields []hpack.HeaderField, end bool) {
	if st, ok := stream.Value().(*fstream); ok {
		st.out(piece{side: u, stream: stream, fields: fields, end: end})
	}
}

// Data implements [h2.Handler].
func (u *upside) Data(stream *h2.Stream, data []byte, end bool) {
	if st, ok := stream.Value().(*fstream); ok {
		st.out(piece{side: u, stream: stream, data: data, end: end})
	}
}

// Reset implements [h2.Handler].
func (u *upside) Reset(stream *h2.Stream, code http2.ErrCode) {
	if st, ok := stream.Value().(*fstream); ok {
		st.reset(code)
	}
}

// Sent implements [h2.Handler]: what the client has sent on the stream is on its way.
func (u *upside) Sent(stream *h2.Stream) {
	if st, ok := stream.Value().(*fstream); ok {
		st.creditClient()
	}
}

// Greeted implements [h2.Handler].
func (u *upside) Greeted() {
	if u.hop == nil {
		return
	}
	u.session.mu.Lock()
	defer u.session.mu.Unlock()
	u.greeted = true
	u.hop.conn, u.hop.dialing, u.hop.pause = u.conn, false, 0
	u.session.tell()
}

// Leaving implements [h2.Handler].
func (u *upside) Leaving() {
	u.session.mu.Lock()
	defer u.session.mu.Unlock()
	u.forget()
}

// Idle implements [h2.Handler].
func (u *upside) Idle() { u.session.flush() }
