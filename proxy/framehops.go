package proxy

import (
	"context"
	"net"
	"slices"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// hop is one of etcd's endpoints, as one session sees it. Its fields are under the session's mu.
type hop struct {
	endpoint string
	conn     *http2conn.Conn // nil while there is none
	dialing  bool
	pause    time.Duration // after the last failure
	again    time.Time     // no sooner is it dialed
	side     *upside       // of conn
	learner  bool          // conn leads to a learner
	ask      time.Time     // no sooner is a learner asked again
}

// keepaliveSilence and keepalivePatience are as those of the other connections to etcd.
const (
	keepaliveSilence  = 15 * time.Second
	keepalivePatience = 10 * time.Second
)

// outlook is what there is to hope for where no connection takes a stream.
type outlook int

const (
	outlookFull    outlook = iota // there are connections, with as many streams as etcd allows
	outlookDown                   // there is none, and there was just none to be had
	outlookDialing                // one is under way
)

// pick returns the connection to etcd whose turn it is, or nil. Those that are down are dialed meanwhile: a client that asks for nothing costs etcd no connection.
// A learner's is for want of others: only if each of those was tried, and failed, is a call sent there.
func (s *session) pick() (*http2conn.Conn, *hop, outlook) {
	s.mu.Lock()
	defer s.mu.Unlock()
	full, dialing, untried := false, false, false
	var learner *hop
	redial := func(h *hop) {
		s.dial(h)
		dialing = dialing || h.dialing
		untried = untried || h.dialing && h.pause == 0
	}
	for i := range s.hops {
		h := s.hops[(s.turn+i)%len(s.hops)]
		switch {
		case h.conn == nil:
			redial(h)
		case h.conn.CanOpen() && h.learner:
			h.lookAgain()
			if learner == nil {
				learner = h
			}
		case h.conn.CanOpen():
			s.turn = (s.turn + i + 1) % len(s.hops)
			return h.conn, h, 0
		case h.conn.Draining(): // it has had all the streams that it may have
			h.conn = nil
			redial(h)
		default:
			full = true
		}
	}
	switch {
	case full:
		return nil, nil, outlookFull
	case untried:
		return nil, nil, outlookDialing
	case learner != nil:
		return learner.conn, learner, 0
	case dialing:
		return nil, nil, outlookDialing
	}
	return nil, nil, outlookDown
}

// await is pick for who waits, up to readyWait, for a connection that is under way; and if patient for one to come.
func (s *session) await(ctx context.Context, patient bool) (*http2conn.Conn, *hop) {
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
		conn, outlet, err := s.id.to.dialEndpoint(ctx, h.endpoint, protocolHTTP2)
		cancel()
		if err == nil {
			s.serveHop(h, conn, outlet)
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

// serveHop serves a connection to etcd to its end. Streams go there once etcd has greeted and, of several members, said that it is no learner.
func (s *session) serveHop(h *hop, conn net.Conn, outlet *http2conn.WriteBuffer) {
	up := &upside{session: s, hop: h}
	up.conn = http2conn.NewClient(conn, http2conn.Config{
		Handler: up, Pool: buffers, WriteBuffer: outlet, Plaintext: s.id.to.tls == nil, HandshakeTimeout: reconnect.MinConnectTimeout, KeepaliveTime: keepaliveSilence, KeepaliveTimeout: keepalivePatience,
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
	all := slices.DeleteFunc(slices.Clone(*s.conns.Load()), func(o *http2conn.Conn) bool { return o == c })
	s.conns.Store(&all)
	s.mu.Unlock()
	for _, stream := range c.Streams() {
		if st, ok := stream.Value().(*fstream); ok {
			st.lost(why)
		}
	}
	s.flush()
}
