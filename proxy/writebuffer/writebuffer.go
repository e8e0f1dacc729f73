// Package writebuffer makes the writes of a network connection non-blocking, and tells when the
// connection is about to wait for its peer. An HTTP/2 connection writes to such a [Buffer] and
// reads from it, directly or through TLS.
package writebuffer

import (
	"errors"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"google.golang.org/grpc/mem"
)

// ErrStalled is returned for a peer that has read nothing for [StallTimeout].
var ErrStalled = errors.New("the peer takes no data")

// StallTimeout is how long a peer may read nothing while data waits for it.
const StallTimeout = time.Minute

// Buffer is a network connection whose writes do not block after [Buffer.Use]. It keeps what the
// peer does not read, and a goroutine writes that; it runs only as long. So the proxy continues to
// read from a peer that it cannot write to, and two peers that are both busy writing cannot block
// each other. It is safe for concurrent use.
type Buffer struct {
	net.Conn
	// nil where non-blocking writes are not possible: the goroutine writes all
	raw        syscall.RawConn
	tryWriteFd func(fd uintptr) bool
	pool       mem.BufferPool // of pending
	empty      func(error)    // called after pending was written, on the goroutine that wrote it
	before     func()         // nil or called before a read
	full       atomic.Bool    // something is kept; changed under mu
	writer     sync.WaitGroup // the goroutine

	mu          sync.Mutex
	pending     []*[]byte // in this order
	pendingSize int       // of pending, and of the rest of what is being written
	deadline    bool      // another caller has set a deadline for writes
	err         error     // of a write; nothing is written after it
	detached    bool      // writes are appended to last, and Conn stays open
	last        []byte
	written     *sync.Cond
	one         [1][]byte
	// Arguments and results of tryWriteFd.
	all  [][]byte
	n    int
	fail error
}

// New returns a Buffer for a connection, which it owns.
func New(conn net.Conn) *Buffer {
	w := &Buffer{Conn: conn, raw: rawConn(conn)}
	w.written, w.tryWriteFd = sync.NewCond(&w.mu), w.tryWrite
	return w
}

// Use makes writes non-blocking from now on. Kept bytes are in buffers of pool. empty is called
// when they were written, or with the error of that, on a goroutine of the Buffer's.
func (w *Buffer) Use(pool mem.BufferPool, empty func(error)) { w.pool, w.empty = pool, empty }

// BeforeRead has f called before each read of the network, on the goroutine that reads. TLS reads
// records ahead: of what it has read, it returns one record at a time without another read. f may
// be nil. The caller must be the goroutine that reads, or no goroutine may read.
func (w *Buffer) BeforeRead(f func()) { w.before = f }

// Read implements net.Conn.
func (w *Buffer) Read(b []byte) (int, error) {
	if w.before != nil {
		w.before()
	}
	return w.Conn.Read(b)
}

// Write implements net.Conn.
func (w *Buffer) Write(b []byte) (int, error) {
	if w.pool == nil {
		return w.Conn.Write(b)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.one[0] = b
	err := w.take(w.one[:])
	w.one[0] = nil
	if err != nil {
		return 0, err
	}
	return len(b), nil
}

// WriteAll is Write for several slices, in place of which it changes all.
func (w *Buffer) WriteAll(all [][]byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.take(all)
}

func (w *Buffer) take(all [][]byte) error {
	if w.detached {
		for _, b := range all {
			w.last = append(w.last, b...)
		}
		return nil
	}
	if w.err == nil && w.raw != nil && !w.full.Load() {
		w.all = all
		if err := w.raw.Write(w.tryWriteFd); err != nil {
			w.n, w.err = 0, err // it is closed, or the deadline has passed
		} else {
			w.err = w.fail
		}
		w.all = nil
		all = skip(all, w.n)
	}
	if w.err != nil {
		return w.err
	}
	for _, b := range all {
		if len(b) > 0 {
			buf := w.pool.Get(len(b))
			copy(*buf, b)
			w.pending = append(w.pending, buf)
			w.pendingSize += len(b)
		}
	}
	if len(w.pending) > 0 && !w.full.Load() {
		w.full.Store(true)
		w.writer.Go(w.writePending)
	}
	return nil
}

// skip returns what follows the first n bytes.
func skip(all [][]byte, n int) [][]byte {
	for len(all) > 0 && n >= len(all[0]) {
		n -= len(all[0])
		all = all[1:]
	}
	if n > 0 {
		all[0] = all[0][n:]
	}
	return all
}

// writePending writes what is pending.
func (w *Buffer) writePending() {
	w.mu.Lock()
	for w.err == nil && len(w.pending) > 0 {
		next := w.pending[0]
		w.pending = w.pending[1:]
		w.mu.Unlock()
		err := w.writeSlowly(*next)
		w.mu.Lock()
		w.pendingSize -= len(*next)
		w.pool.Put(next)
		if w.err == nil {
			w.err = err
		}
	}
	for _, b := range w.pending {
		w.pool.Put(b)
	}
	if w.err == nil && !w.deadline {
		w.err = w.Conn.SetWriteDeadline(time.Time{})
	}
	err := w.err
	w.pending, w.pendingSize = nil, 0
	w.full.Store(false)
	w.written.Broadcast()
	w.mu.Unlock()
	w.empty(err)
}

// writeSlowly writes b. It fails when the peer reads nothing for StallTimeout.
func (w *Buffer) writeSlowly(b []byte) error {
	for {
		w.mu.Lock()
		ownDeadline := !w.deadline
		if ownDeadline {
			_ = w.Conn.SetWriteDeadline(time.Now().Add(StallTimeout)) // the write fails, too
		}
		w.mu.Unlock()
		n, err := w.Conn.Write(b)
		switch b = b[n:]; {
		case err == nil:
			return nil
		case !ownDeadline || !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		case n == 0:
			return ErrStalled
		}
	}
}

// SetWriteDeadline implements net.Conn.
func (w *Buffer) SetWriteDeadline(t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.deadline = !t.IsZero()
	return w.Conn.SetWriteDeadline(t)
}

// SetDeadline implements net.Conn.
func (w *Buffer) SetDeadline(t time.Time) error {
	if err := w.SetWriteDeadline(t); err != nil {
		return err
	}
	return w.Conn.SetReadDeadline(t) //nolint:staticcheck // the method of the same name is this one
}

// Close implements net.Conn. What is kept is lost.
func (w *Buffer) Close() error {
	w.mu.Lock()
	if w.err == nil {
		w.err = net.ErrClosed
	}
	detached := w.detached
	w.mu.Unlock()
	if detached {
		return nil
	}
	return w.Conn.Close()
}

// Full reports whether something is kept.
func (w *Buffer) Full() bool { return w.full.Load() }

// Size is how many bytes are kept.
func (w *Buffer) Size() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.pendingSize
}

// Wait waits until nothing is kept.
func (w *Buffer) Wait() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.full.Load() {
		w.written.Wait()
	}
}

// WaitWriter waits until no goroutine of the Buffer's runs. Nothing may be written meanwhile.
func (w *Buffer) WaitWriter() { w.writer.Wait() }

// Detach has writes collect for [Buffer.Detached] from now on, and keeps the connection open after
// Close. It reports false, and does nothing, if there is something to write before.
func (w *Buffer) Detach() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.detached = !w.full.Load() && w.err == nil
	return w.detached
}

// Detached returns the connection and what was written since [Buffer.Detach]. The caller owns both.
// It returns nil without Detach.
func (w *Buffer) Detached() (conn net.Conn, written []byte) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.detached {
		return nil, nil
	}
	return w.Conn, w.last
}
