package http2conn

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

// WriteBuffer is a network connection whose writes do not block, once a [Conn] writes to it,
// directly or through TLS. It keeps what the peer does not read, and a goroutine writes that; it
// runs only as long. So the proxy continues to read from a peer that it cannot write to, and two
// peers that are both busy writing cannot block each other. It is safe for concurrent use.
type WriteBuffer struct {
	net.Conn
	// nil where non-blocking writes are not possible: the goroutine writes all
	raw    syscall.RawConn
	try    func(fd uintptr) bool
	pool   mem.BufferPool // of kept
	empty  func(error)    // called after kept was written, on the goroutine that wrote it
	full   atomic.Bool    // something is kept; changed under mu
	writer sync.WaitGroup // the goroutine

	mu       sync.Mutex
	kept     []*[]byte // in this order
	keptSize int       // of kept, and of the rest of what is being written
	deadline bool      // another caller has set a deadline for writes
	err      error     // of a write; nothing is written after it
	detached bool      // writes are appended to last, and Conn stays open
	last     []byte
	written  *sync.Cond
	one      [1][]byte
	// Arguments and results of try.
	all  [][]byte
	n    int
	fail error
}

// NewWriteBuffer returns a WriteBuffer for a connection.
func NewWriteBuffer(conn net.Conn) *WriteBuffer {
	w := &WriteBuffer{Conn: conn, raw: rawConn(conn)}
	w.written, w.try = sync.NewCond(&w.mu), w.tryWrite
	return w
}

// use makes writes non-blocking from now on.
func (w *WriteBuffer) use(pool mem.BufferPool, empty func(error)) { w.pool, w.empty = pool, empty }

// Write implements net.Conn.
func (w *WriteBuffer) Write(b []byte) (int, error) {
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

// writeAll is Write for several slices.
func (w *WriteBuffer) writeAll(all [][]byte) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.take(all)
}

func (w *WriteBuffer) take(all [][]byte) error {
	if w.detached {
		for _, b := range all {
			w.last = append(w.last, b...)
		}
		return nil
	}
	if w.err == nil && w.raw != nil && !w.full.Load() {
		w.all = all
		if err := w.raw.Write(w.try); err != nil {
			w.n, w.err = 0, err // it is closed, or the deadline has passed
		} else {
			w.err = w.fail
		}
		w.all = nil
		all = after(all, w.n)
	}
	if w.err != nil {
		return w.err
	}
	for _, b := range all {
		if len(b) > 0 {
			kept := w.pool.Get(len(b))
			copy(*kept, b)
			w.kept = append(w.kept, kept)
			w.keptSize += len(b)
		}
	}
	if len(w.kept) > 0 && !w.full.Load() {
		w.full.Store(true)
		w.writer.Go(w.writeKept)
	}
	return nil
}

// after returns what follows the first n bytes.
func after(all [][]byte, n int) [][]byte {
	for len(all) > 0 && n >= len(all[0]) {
		n -= len(all[0])
		all = all[1:]
	}
	if n > 0 {
		all[0] = all[0][n:]
	}
	return all
}

// writeKept writes what is kept.
func (w *WriteBuffer) writeKept() {
	w.mu.Lock()
	for w.err == nil && len(w.kept) > 0 {
		next := w.kept[0]
		w.kept = w.kept[1:]
		w.mu.Unlock()
		err := w.writeSlowly(*next)
		w.mu.Lock()
		w.keptSize -= len(*next)
		w.pool.Put(next)
		if w.err == nil {
			w.err = err
		}
	}
	for _, b := range w.kept {
		w.pool.Put(b)
	}
	if w.err == nil && !w.deadline {
		w.err = w.Conn.SetWriteDeadline(time.Time{})
	}
	err := w.err
	w.kept, w.keptSize = nil, 0
	w.full.Store(false)
	w.written.Broadcast()
	w.mu.Unlock()
	w.empty(err)
}

// writeSlowly writes b. It fails when the peer reads nothing for stallTimeout.
func (w *WriteBuffer) writeSlowly(b []byte) error {
	for {
		w.mu.Lock()
		ours := !w.deadline
		if ours {
			_ = w.Conn.SetWriteDeadline(time.Now().Add(stallTimeout)) // the write fails, too
		}
		w.mu.Unlock()
		n, err := w.Conn.Write(b)
		switch b = b[n:]; {
		case err == nil:
			return nil
		case !ours || !errors.Is(err, os.ErrDeadlineExceeded):
			return err
		case n == 0:
			return errStalled
		}
	}
}

// SetWriteDeadline implements net.Conn.
func (w *WriteBuffer) SetWriteDeadline(t time.Time) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.deadline = !t.IsZero()
	return w.Conn.SetWriteDeadline(t)
}

// SetDeadline implements net.Conn.
func (w *WriteBuffer) SetDeadline(t time.Time) error {
	if err := w.SetWriteDeadline(t); err != nil {
		return err
	}
	return w.Conn.SetReadDeadline(t) //nolint:staticcheck // the method of the same name is this one
}

// Close implements net.Conn. What is kept is lost.
func (w *WriteBuffer) Close() error {
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

// size is how many bytes are kept.
func (w *WriteBuffer) size() int {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.keptSize
}

// wait waits until nothing is kept.
func (w *WriteBuffer) wait() {
	w.mu.Lock()
	defer w.mu.Unlock()
	for w.full.Load() {
		w.written.Wait()
	}
}
