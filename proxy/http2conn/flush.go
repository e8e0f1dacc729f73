package http2conn

import (
	"io"
	"sync/atomic"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/mem"
)

// output are the frames that are to be written, in order.
type output struct {
	pool      mem.BufferPool
	plaintext bool           // long data is written from where it is
	pending   *[]byte        // nil or of pool
	external  externalChunks // data to be written between the bytes of pending
	framer    *http2.Framer  // appends frames that are rare
	encoder   headerEncoder
	closed    bool
	dirty     atomic.Bool // there may be something to flush; set by holders of mu
}

var _ io.Writer = (*output)(nil)

// Write implements io.Writer, for framer.
func (o *output) Write(b []byte) (int, error) {
	o.append(b)
	return len(b), nil
}

// append appends b to the pending bytes, unless the connection is closed.
func (o *output) append(b []byte) {
	if o.closed {
		return
	}
	if !o.dirty.Load() { // a store costs more
		o.dirty.Store(true)
	}
	if o.pending == nil || len(*o.pending)+len(b) > cap(*o.pending) {
		o.grow(len(b))
	}
	*o.pending = append(*o.pending, b...)
}

// grow makes room for n more pending bytes.
func (o *output) grow(n int) {
	have := o.pending
	if have == nil {
		o.pending = o.pool.Get(max(n, minWriteSize))
		*o.pending = (*o.pending)[:0]
		return
	}
	o.pending = o.pool.Get(max(len(*have)+n, 2*cap(*have)))
	*o.pending = append((*o.pending)[:0], *have...)
	o.pool.Put(have)
}

// frameHeader appends the header of a frame of n bytes, which the caller appends. http2.Framer
// would copy the frame once more.
func (o *output) frameHeader(n int, kind http2.FrameType, flags http2.Flags, id uint32) {
	head := [frameHeaderSize]byte{
		byte(n >> 16), byte(n >> 8), byte(n), byte(kind), byte(flags), //nolint:gosec // a frame has at most 16 MiB
		byte(id >> 24), byte(id >> 16), byte(id >> 8), byte(id), //nolint:gosec // the bytes of a number
	}
	o.append(head[:])
}

// size is how many bytes the next flush writes.
func (o *output) size() int {
	if o.pending == nil {
		return 0
	}
	return len(*o.pending) + o.external.size
}

// close gives the buffers back, and takes nothing more.
func (o *output) close() {
	o.closed = true
	if o.pending != nil {
		o.pool.Put(o.pending)
		o.pending = nil
	}
	o.external.free()
}

// NeedsFlush reports whether there may be something to flush, and the peer reads.
func (c *Conn) NeedsFlush() bool { return c.out.dirty.Load() && !c.writeBuffer.Full() }

// Flush writes the pending frames without waiting for the peer: while the peer does not read,
// frames stay pending, and [Handler] is told by FlushNeeded when it reads again. A write error ends
// the connection, and [Conn.Serve] returns it.
func (c *Conn) Flush() {
	if !c.NeedsFlush() {
		return
	}
	c.flushMu.Lock()
	var writable []*Stream
	for {
		pending, external, done := c.takePending()
		if pending == nil {
			writable = done
			break
		}
		err := c.out.write(c.conn, c.writeBuffer, *pending, external)
		c.cfg.Pool.Put(pending)
		external.free()
		if err != nil {
			c.fail(err)
			break
		}
		if !c.out.dirty.Load() {
			break
		}
	}
	c.flushing.Store(false)
	c.flushMu.Unlock()
	for _, s := range writable {
		c.cfg.Handler.Writable(s)
	}
	c.closeIfDone()
}

// takePending takes what is to be written next. If there is nothing, it returns the streams whose
// queues have emptied.
func (c *Conn) takePending() (pending *[]byte, external externalChunks, writable []*Stream) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.writeBuffer.Full() {
		return nil, externalChunks{}, nil
	}
	c.send.sendReady()
	if c.out.pending != nil {
		pending, external = c.out.pending, c.out.external
		c.out.pending, c.out.external = nil, externalChunks{}
		c.flushing.Store(true)
		c.out.dirty.Store(len(c.send.ready) > 0 || len(c.send.writable) > 0)
		return pending, external, nil
	}
	for _, s := range c.send.writable {
		if len(s.queue) == 0 { // else there is new data, and Writable is called after that
			writable = append(writable, s)
		}
	}
	c.send.writable = nil
	c.out.dirty.Store(false)
	return nil, externalChunks{}, writable
}
