package relay

import (
	"context"
	"net"
	"slices"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/tlsfiles"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/writebuffer"
)

// endpointState is an endpoint of etcd, as one session sees it. The session's mu guards it.
type endpointState struct {
	url           string
	index         int             // in endpoints
	conn          *http2conn.Conn // nil while there is none
	dialing       bool
	pause         time.Duration // after the last failure
	nextDial      time.Time     // earliest time of the next dial
	upstream      *upstreamConn // of conn
	learner       bool          // conn leads to a learner
	nextRoleCheck time.Time     // earliest time of the next role check
}

// keepaliveTime and keepaliveTimeout are those of all connections to etcd.
const (
	keepaliveTime    = 15 * time.Second
	keepaliveTimeout = 10 * time.Second
)

// availability says why no connection takes a stream.
type availability int

const (
	endpointsFull    availability = iota // all connections have as many streams as etcd allows
	endpointsDown                        // no connection, and dialing has just failed
	endpointsDialing                     // no connection yet
)

// pick returns the next connection to etcd, round robin, or nil. It dials endpoints without a
// connection: an idle client costs etcd no connection. A call goes to a learner only if dialing
// every other endpoint has failed.
func (s *session) pick() (*http2conn.Conn, *endpointState, availability) {
	s.mu.Lock()
	defer s.mu.Unlock()
	full, dialing, untried := false, false, false
	var learner *endpointState
	redial := func(h *endpointState) {
		s.dial(h)
		dialing = dialing || h.dialing
		untried = untried || h.dialing && h.pause == 0
	}
	for i := range s.endpoints {
		h := s.endpoints[(s.nextEndpoint+i)%len(s.endpoints)]
		switch {
		case h.conn == nil:
			redial(h)
		case h.conn.CanOpen() && h.learner:
			h.recheckRole()
			if learner == nil {
				learner = h
			}
		case h.conn.CanOpen():
			s.nextEndpoint = (s.nextEndpoint + i + 1) % len(s.endpoints)
			return h.conn, h, 0
		case h.conn.Draining(): // it accepts no new streams
			h.conn = nil
			redial(h)
		default:
			full = true
		}
	}
	switch {
	case full:
		return nil, nil, endpointsFull
	case untried:
		return nil, nil, endpointsDialing
	case learner != nil:
		return learner.conn, learner, 0
	case dialing:
		return nil, nil, endpointsDialing
	}
	return nil, nil, endpointsDown
}

// await is pick that waits up to upstream.ConnectWait while an endpoint is dialed or, with mayWait,
// until one is connected.
func (s *session) await(ctx context.Context, mayWait bool) (*http2conn.Conn, *endpointState) {
	timer := time.NewTimer(upstream.ConnectWait)
	defer timer.Stop()
	ticker := time.NewTicker(upstream.ConnectParams.Backoff.BaseDelay)
	defer ticker.Stop()
	for {
		s.mu.Lock()
		changed := s.changed
		s.mu.Unlock()
		conn, h, state := s.pick()
		if conn != nil || state == endpointsFull || state == endpointsDown && !mayWait {
			return conn, h
		}
		select {
		case <-changed:
		case <-ticker.C:
		case <-timer.C:
			return nil, nil
		case <-ctx.Done():
			return nil, nil
		}
	}
}

// dial connects to an endpoint in the background, unless it is being dialed or has just failed. The
// caller holds mu.
func (s *session) dial(h *endpointState) {
	if h.dialing || s.ended || time.Now().Before(h.nextDial) {
		return
	}
	h.dialing = true
	s.work.Go(func() {
		ctx, cancel := context.WithTimeout(s.engine.base, upstream.ConnectParams.MinConnectTimeout)
		conn, buffer, err := s.id.Upstream.DialEndpoint(ctx, h.url, tlsfiles.ProtocolHTTP2)
		cancel()
		if err == nil {
			s.serveEndpoint(h, conn, buffer)
			return
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		h.failed()
		s.notifyChanged()
	})
}

// failed notes that dialing has failed. The caller holds the session's mu.
func (h *endpointState) failed() {
	h.dialing = false
	h.pause = min(max(h.pause*8/5, upstream.ConnectParams.Backoff.BaseDelay), upstream.ConnectParams.Backoff.MaxDelay)
	h.nextDial = time.Now().Add(h.pause)
}

// serveEndpoint serves a connection to etcd until it ends. Calls use it after etcd's SETTINGS and,
// if there are several members, after the role check.
func (s *session) serveEndpoint(h *endpointState, conn net.Conn, buffer *writebuffer.Buffer) {
	up := &upstreamConn{session: s, endpoint: h}
	up.conn = http2conn.NewClient(conn, http2conn.Config{
		Handler: up, Pool: rpc.Buffers, WriteBuffer: buffer, Plaintext: s.id.Upstream.TLS == nil, HandshakeTimeout: upstream.ConnectParams.MinConnectTimeout, KeepaliveTime: keepaliveTime, KeepaliveTimeout: keepaliveTimeout,
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

// serveUp serves a connection to etcd, and ends the calls that it carried. If a client has received
// a part of a message, its own connection ends, too, as it would without the proxy: gRPC reports
// such a call as Unavailable, and clients repeat it. A message that is cut off by a trailer or by
// RST_STREAM is Internal to some clients, whatever the status, and they do not repeat the call.
func (s *session) serveUp(up *upstreamConn) {
	c := up.conn
	why := c.Serve()
	s.mu.Lock()
	up.remove()
	all := slices.DeleteFunc(slices.Clone(*s.conns.Load()), func(o *http2conn.Conn) bool { return o == c })
	s.conns.Store(&all)
	s.mu.Unlock()
	whole := true
	for _, stream := range c.Streams() {
		if st, ok := stream.Value().(*clientStream); ok {
			whole = st.upstreamLost(why) && whole
		}
	}
	s.flush()
	if !whole {
		s.client.Close()
	}
}
