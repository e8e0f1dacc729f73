package listener

import (
	"errors"
	"net"
	"sync"
	"time"
)

// joinedListener accepts from several sockets.
type joinedListener struct {
	sockets  []net.Listener
	accepted chan acceptResult
	closing  chan struct{}
	closed   chan struct{} // all sockets are, and what they accepted was handed on
	once     sync.Once
	running  sync.WaitGroup
	start    sync.Once
}

type acceptResult struct {
	conn net.Conn
	err  error
}

// joinListeners returns one listener for sockets, of which there is at least one.
func joinListeners(sockets []net.Listener) net.Listener {
	if len(sockets) == 1 {
		return sockets[0]
	}
	return &joinedListener{sockets: sockets, accepted: make(chan acceptResult), closing: make(chan struct{}), closed: make(chan struct{})}
}

// Accept implements [net.Listener]. It starts a goroutine for each socket, for which Close waits.
// Connections that were accepted before Close are still returned.
func (l *joinedListener) Accept() (net.Conn, error) {
	l.start.Do(func() {
		for _, s := range l.sockets {
			l.running.Go(func() { l.accept(s) })
		}
	})
	select {
	case r := <-l.accepted:
		return r.conn, r.err
	case <-l.closed:
		return nil, net.ErrClosed
	}
}

func (l *joinedListener) accept(s net.Listener) {
	for {
		conn, err := s.Accept()
		if errors.Is(err, net.ErrClosed) {
			return
		}
		select {
		case l.accepted <- acceptResult{conn, err}:
		case <-l.closing:
			l.handOn(conn)
			return
		}
	}
}

// handOn returns a last connection from Accept if that is called in time.
func (l *joinedListener) handOn(conn net.Conn) {
	if conn == nil {
		return
	}
	timer := time.NewTimer(LateHandshake)
	defer timer.Stop()
	select {
	case l.accepted <- acceptResult{conn: conn}:
	case <-timer.C:
		_ = conn.Close()
	}
}

// Addr is the address of the first socket.
func (l *joinedListener) Addr() net.Addr { return l.sockets[0].Addr() }

// Close closes all sockets.
func (l *joinedListener) Close() error {
	var err error
	l.once.Do(func() {
		close(l.closing)
		for _, s := range l.sockets {
			err = errors.Join(err, s.Close())
		}
		l.start.Do(func() {}) // nothing is started any more
		l.running.Wait()
		close(l.closed)
	})
	return err
}
