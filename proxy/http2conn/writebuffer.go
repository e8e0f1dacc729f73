package http2conn

import (
	"net"
	"sync"
	"sync/atomic"
	"syscall"

	"google.golang.org/grpc/mem"
)

// WriteBuffer is a connection that takes all that is written to it without waiting, from when a [Conn] writes to it, itself or over TLS: what the peer does not take is kept, and a goroutine writes it, which
// there is only for as long. So whoever reads the peer goes on reading, and two that face each other and are both busy sending hear each other nevertheless. Before that it is the connection that it was
// made of. It is safe for concurrent use.
type WriteBuffer struct {
	net.Conn
	raw    syscall.RawConn // nil where the system cannot be asked to write without waiting: then the goroutine writes it all
	try    func(fd uintptr) bool
	pool   mem.BufferPool // of what is kept
	freed  func(error)    // called when nothing is kept any more, on the goroutine that wrote it
	full   atomic.Bool    // something is kept; changed under mu
	writer sync.WaitGroup // the goroutine

	mu   sync.Mutex
	kept []*[]byte // in this order
	size int       // of kept, and of what is being written of it
	err  error     // why nothing is written any more
	room *sync.Cond
	one  [1][]byte
	// What try is told and tells.
	all  [][]byte
	n    int
	fail error
}

// NewWriteBuffer makes an WriteBuffer of a connection.
func NewWriteBuffer(conn net.Conn) *WriteBuffer {
	o := &WriteBuffer{Conn: conn, raw: rawConn(conn)}
	o.room, o.try = sync.NewCond(&o.mu), o.tryOnce
	return o
}

// use has the WriteBuffer take what is written at once from now on.
func (o *WriteBuffer) use(pool mem.BufferPool, freed func(error)) { o.pool, o.freed = pool, freed }

// Write implements net.Conn.
func (o *WriteBuffer) Write(b []byte) (int, error) {
	if o.pool == nil {
		return o.Conn.Write(b)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	o.one[0] = b
	err := o.take(o.one[:])
	o.one[0] = nil
	if err != nil {
		return 0, err
	}
	return len(b), nil
}

// writeAll is Write for bytes that are in several places.
func (o *WriteBuffer) writeAll(all [][]byte) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.take(all)
}

func (o *WriteBuffer) take(all [][]byte) error {
	if o.err == nil && o.raw != nil && !o.full.Load() {
		o.all = all
		if err := o.raw.Write(o.try); err != nil {
			o.n, o.err = 0, err // it is closed, or has come to its deadline
		} else {
			o.err = o.fail
		}
		o.all = nil
		all = after(all, o.n)
	}
	if o.err != nil {
		return o.err
	}
	for _, b := range all {
		if len(b) > 0 {
			kept := o.pool.Get(len(b))
			copy(*kept, b)
			o.kept = append(o.kept, kept)
			o.size += len(b)
		}
	}
	if len(o.kept) > 0 && !o.full.Load() {
		o.full.Store(true)
		o.writer.Go(o.write)
	}
	return nil
}

// after is what follows the first n bytes.
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

// write writes what is kept.
func (o *WriteBuffer) write() {
	o.mu.Lock()
	for o.err == nil && len(o.kept) > 0 {
		next := o.kept[0]
		o.kept = o.kept[1:]
		o.mu.Unlock()
		_, err := o.Conn.Write(*next)
		o.mu.Lock()
		o.size -= len(*next)
		o.pool.Put(next)
		if o.err == nil {
			o.err = err
		}
	}
	for _, b := range o.kept {
		o.pool.Put(b)
	}
	err := o.err
	o.kept, o.size = nil, 0
	o.full.Store(false)
	o.room.Broadcast()
	o.mu.Unlock()
	o.freed(err)
}

// Close implements net.Conn. What is kept is lost.
func (o *WriteBuffer) Close() error {
	o.mu.Lock()
	if o.err == nil {
		o.err = net.ErrClosed
	}
	o.mu.Unlock()
	return o.Conn.Close()
}

// holds is how many bytes are kept.
func (o *WriteBuffer) holds() int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.size
}

// wait waits until nothing is kept.
func (o *WriteBuffer) wait() {
	o.mu.Lock()
	defer o.mu.Unlock()
	for o.full.Load() {
		o.room.Wait()
	}
}
