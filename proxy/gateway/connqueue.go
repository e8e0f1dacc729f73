package gateway

import (
	"context"
	"net"
	"net/http"
	"slices"
	"sync"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
)

// connQueue passes connections of identified clients to net/http, and keeps track of them.
type connQueue struct {
	conns chan *listener.Conn
	done  chan struct{}
	once  sync.Once

	putting sync.Mutex    // for one connection at a time
	taken   chan struct{} // net/http has taken the connection that was put
	open    sync.WaitGroup
	mu      sync.Mutex
	fresh   map[net.Conn]struct{} // open and without a request so far
	denied  []*listener.Conn      // open, of clients that are not allowed; the oldest first
}

// maxDenied is how many connections of clients that are not allowed are open at a time. The oldest
// is closed for a new one. Clients of HTTP/1 do not connect again before their next request.
const maxDenied = 64

var _ net.Listener = (*connQueue)(nil)

func newConnQueue() *connQueue {
	return &connQueue{conns: make(chan *listener.Conn), done: make(chan struct{}), taken: make(chan struct{}), fresh: make(map[net.Conn]struct{})}
}

// put returns once a drain would wait for the connection.
func (q *connQueue) put(conn *listener.Conn) {
	q.putting.Lock()
	defer q.putting.Unlock()
	select {
	case q.conns <- conn:
		<-q.taken
	case <-q.done:
		_ = conn.Close()
	}
}

// state is the hook of net/http.
func (q *connQueue) state(conn net.Conn, s http.ConnState) {
	q.mu.Lock()
	if s == http.StateNew {
		q.fresh[conn] = struct{}{}
	} else {
		delete(q.fresh, conn)
	}
	if c, ok := conn.(*listener.Conn); ok && c.Identity.Denied {
		q.limitDenied(c, s)
	}
	q.mu.Unlock()
	switch s {
	case http.StateNew:
		q.open.Add(1)
		q.taken <- struct{}{}
	case http.StateHijacked, http.StateClosed:
		q.open.Done()
	}
}

// limitDenied keeps account of a connection of a client that is not allowed. The caller holds mu.
func (q *connQueue) limitDenied(conn *listener.Conn, s http.ConnState) {
	switch s {
	case http.StateNew:
		if len(q.denied) == maxDenied {
			// the connection below TLS: to send close_notify may block
			_ = q.denied[0].WriteBuffer.Close()
			q.denied = slices.Delete(q.denied, 0, 1)
		}
		q.denied = append(q.denied, conn)
	case http.StateHijacked, http.StateClosed:
		q.denied = slices.DeleteFunc(q.denied, func(other *listener.Conn) bool { return other == conn })
	}
}

// drain waits until all connections are closed, which net/http does after their requests, or until
// ctx ends. Those over which no request comes in time are closed. Nothing is put any more.
func (q *connQueue) drain(ctx context.Context) {
	late := time.AfterFunc(listener.LateHandshake, func() {
		q.mu.Lock()
		defer q.mu.Unlock()
		for conn := range q.fresh {
			_ = conn.Close()
		}
	})
	defer late.Stop()
	closed := make(chan struct{})
	go func() {
		q.open.Wait()
		close(closed)
	}()
	select {
	case <-closed:
	case <-ctx.Done():
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
