package proxy

import (
	"net"
	"slices"
	"strings"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/test/bufconn"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/http2conn"
)

// isWeb reports whether a request over HTTP/2 is none of gRPC. etcd tells the two apart by the same
// rule, and only over TLS: without it, HTTP/2 is gRPC's.
func isWeb(fields []hpack.HeaderField) bool {
	return !slices.ContainsFunc(fields, func(f hpack.HeaderField) bool {
		return f.Name == "content-type" && strings.Contains(f.Value, contentType)
	})
}

// toWeb hands a stream on to the gateway.
func (st *fstream) toWeb(end bool) {
	st.silent, st.web = end, true
	st.mu.Lock()
	if st.ended.Load() {
		st.mu.Unlock()
		return
	}
	st.openOnFirst(st.session.gateway)
	up := st.up
	st.mu.Unlock()
	if up == nil {
		st.fail(errShuttingDown)
	}
}

// failWeb ends a stream of the gateway's that gRPC's statuses mean nothing to.
func (st *fstream) failWeb() {
	st.client.Reset(http2.ErrCodeInternal)
	st.leaveUp()
}

// gateway returns the connection to the gateway, and nil once there can be none.
func (s *session) gateway() *http2conn.Conn {
	return s.within(&s.web, s.engine.web)
}

// within returns the connection to a server within the process that is kept at place, and makes it
// if need be. It returns nil once there can be none.
func (s *session) within(place **http2conn.Conn, serve func(*clientConn)) *http2conn.Conn {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.ended || serve == nil {
		return nil
	}
	if *place != nil && (*place).CanOpen() {
		return *place
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
	up := &upside{session: s, place: place}
	up.conn = http2conn.NewClient(near, http2conn.Config{Handler: up, Pool: buffers, HandshakeTimeout: handshakeTimeout, IdleTimeout: referenceIdle})
	*place = up.conn
	s.add(up.conn)
	s.work.Go(func() { serve(&clientConn{Conn: far, id: s.id, closed: func() {}}) })
	s.work.Go(func() { s.serveUp(up) })
	return up.conn
}
