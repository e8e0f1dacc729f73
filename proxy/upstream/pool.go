package upstream

import (
	"context"
	"encoding/binary"
	"errors"
	"math"
	"net"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// Handled calls of all clients share connections to etcd. Where etcd limits the streams on each
// connection (--max-concurrent-streams), the watches of one client would block the calls of all
// others. So the pool opens another connection when the limit is reached.

// PoolConn is a pooled connection: one to each endpoint.
type PoolConn struct {
	Conn  *grpc.ClientConn
	calls atomic.Int64 // in use
}

// Release returns the connection to the pool. [Cluster.Acquire] has returned it.
func (l *PoolConn) Release() { l.calls.Add(-1) }

// poolIdleTimeout is how long a further connection stays connected without calls.
const poolIdleTimeout = 5 * time.Minute

// pool holds the connections beyond the first.
type pool struct {
	limit atomic.Int64 // the lowest stream limit that an endpoint has announced

	mu      sync.Mutex
	clients []*clientv3.Client
	others  []*PoolConn
	closed  bool
}

// Acquire returns a connection that has a stream left for one more call. The caller releases it.
func (u *Cluster) Acquire() *PoolConn {
	if u.first.calls.Add(1) <= u.pool.limit.Load() {
		return u.first
	}
	u.pool.mu.Lock()
	defer u.pool.mu.Unlock()
	for _, l := range u.pool.others {
		if l.calls.Add(1) <= u.pool.limit.Load() {
			u.first.Release()
			return l
		}
		l.Release()
	}
	if u.pool.closed {
		return u.first
	}
	client, err := u.dial(grpc.WithIdleTimeout(poolIdleTimeout))
	if err != nil { // the first was made in the same way
		u.log.Error("no further connection to etcd can be made; calls wait for each other", "error", err)
		return u.first
	}
	l := &PoolConn{Conn: client.ActiveConnection()}
	l.calls.Add(1)
	u.pool.clients, u.pool.others = append(u.pool.clients, client), append(u.pool.others, l)
	u.first.Release()
	return l
}

// lowerLimit notes what a server allows. It is never forgotten: a further connection is cheap, and
// a call that waits is not.
func (l *pool) lowerLimit(limit uint32) {
	for {
		known := l.limit.Load()
		if limit == 0 || int64(limit) >= known || l.limit.CompareAndSwap(known, int64(limit)) {
			return
		}
	}
}

func (l *pool) Close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.closed = true
	for _, c := range l.clients {
		_ = c.Close() // it reports the end of its own context
	}
}

// settingsCredentials are credentials that read along what the server allows.
type settingsCredentials struct {
	credentials.TransportCredentials
	lowerLimit func(limit uint32)
}

// ClientHandshake implements credentials.TransportCredentials.
func (c settingsCredentials) ClientHandshake(ctx context.Context, authority string, conn net.Conn) (net.Conn, credentials.AuthInfo, error) {
	conn, info, err := c.TransportCredentials.ClientHandshake(ctx, authority, conn)
	if err != nil {
		return nil, nil, err
	}
	return &settingsConn{Conn: conn, lowerLimit: c.lowerLimit}, info, nil
}

// Clone implements credentials.TransportCredentials.
func (c settingsCredentials) Clone() credentials.TransportCredentials {
	return settingsCredentials{c.TransportCredentials.Clone(), c.lowerLimit}
}

// settingsConn is a connection whose first frame from the server, its SETTINGS by the rules of
// HTTP/2, is read along. One goroutine reads from it.
type settingsConn struct {
	net.Conn
	lowerLimit func(limit uint32) // nil once the frame was seen
	settings   []byte
}

// Read implements net.Conn.
func (c *settingsConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if errno := syscall.Errno(0); errors.As(err, &errno) {
		err = errno // clients are told what, as by etcd, and not where etcd is
	}
	if c.lowerLimit == nil {
		return n, err
	}
	c.settings = append(c.settings, b[:n]...)
	if limit, done := streamLimit(c.settings); done {
		c.lowerLimit(limit)
		c.lowerLimit, c.settings = nil, nil
	}
	return n, err
}

// streamLimit returns SETTINGS_MAX_CONCURRENT_STREAMS of a frame of settings at the front of b:
// MaxUint32, which is no limit, if it does not say. done is false if the frame continues.
func streamLimit(b []byte) (limit uint32, done bool) {
	const head, settings, ack, setting, maxConcurrentStreams, maxFrame = 9, 4, 1, 6, 3, 16 << 10
	if len(b) < head {
		return 0, false
	}
	size := int(b[0])<<16 | int(b[1])<<8 | int(b[2])
	if b[3] != settings || b[4]&ack != 0 || size > maxFrame {
		return math.MaxUint32, true // gRPC will say what it thinks of that
	}
	if len(b) < head+size {
		return 0, false
	}
	limit = math.MaxUint32
	for b = b[head : head+size]; len(b) >= setting; b = b[setting:] {
		if binary.BigEndian.Uint16(b) == maxConcurrentStreams {
			limit = binary.BigEndian.Uint32(b[2:])
		}
	}
	return limit, true
}
