package proxy

import (
	"context"
	"errors"
	"net"
	"sync"

	"google.golang.org/grpc/credentials"
)

// connQueue hands identified connections to a server.
type connQueue struct {
	conns chan *clientConn
	done  chan struct{}
	once  sync.Once
}

var _ net.Listener = (*connQueue)(nil)

func newConnQueue() *connQueue {
	return &connQueue{conns: make(chan *clientConn), done: make(chan struct{})}
}

func (q *connQueue) put(conn *clientConn) {
	select {
	case q.conns <- conn:
	case <-q.done:
		_ = conn.Close()
	}
}

// Accept implements net.Listener.
func (q *connQueue) Accept() (net.Conn, error) {
	select {
	case conn := <-q.conns:
		return conn, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

// Close implements net.Listener.
func (q *connQueue) Close() error {
	q.once.Do(func() { close(q.done) })
	return nil
}

// Addr implements net.Listener.
func (q *connQueue) Addr() net.Addr { return &net.UnixAddr{Name: "proxy", Net: "unix"} }

// identityCredentials tell grpc-go what the listener has found out; there is no handshake left to do.
type identityCredentials struct{}

var _ credentials.TransportCredentials = identityCredentials{}

// identityInfo rides on every call of a connection.
type identityInfo struct {
	credentials.CommonAuthInfo
	id *Identity
}

// AuthType implements credentials.AuthInfo.
func (identityInfo) AuthType() string { return "etcd-kms-proxy" }

// ServerHandshake implements credentials.TransportCredentials.
func (identityCredentials) ServerHandshake(conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	c, ok := conn.(*clientConn)
	if !ok {
		return nil, nil, errors.New("connection without an identity")
	}
	return c, identityInfo{id: c.id}, nil
}

// ClientHandshake implements credentials.TransportCredentials; these credentials are a server's.
func (identityCredentials) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("client handshake with a server's credentials")
}

// Info implements credentials.TransportCredentials.
func (identityCredentials) Info() credentials.ProtocolInfo { return credentials.ProtocolInfo{} }

// Clone implements credentials.TransportCredentials.
func (c identityCredentials) Clone() credentials.TransportCredentials { return c }

// OverrideServerName implements credentials.TransportCredentials.
func (identityCredentials) OverrideServerName(string) error { return nil }
