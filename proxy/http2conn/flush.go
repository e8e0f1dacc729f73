package http2conn

import "golang.org/x/net/http2"

// frameSink receives the frames of the http2.Framer that writes.
type frameSink Conn

// Write implements io.Writer.
func (f *frameSink) Write(b []byte) (int, error) {
	(*Conn)(f).append(b)
	return len(b), nil
}

// append appends b to the pending bytes, unless the connection is closed. The caller holds mu.
func (c *Conn) append(b []byte) {
	if c.closed {
		return
	}
	if !c.dirty.Load() { // a store costs more
		c.dirty.Store(true)
	}
	if c.pending == nil || len(*c.pending)+len(b) > cap(*c.pending) {
		c.growPending(len(b))
	}
	*c.pending = append(*c.pending, b...)
}

// growPending makes room for n more pending bytes.
func (c *Conn) growPending(n int) {
	have := c.pending
	if have == nil {
		c.pending = c.cfg.Pool.Get(max(n, minWriteSize))
		*c.pending = (*c.pending)[:0]
		return
	}
	c.pending = c.cfg.Pool.Get(max(len(*have)+n, 2*cap(*have)))
	*c.pending = append((*c.pending)[:0], *have...)
	c.cfg.Pool.Put(have)
}

// appendFrameHeader appends the header of a frame of n bytes, which the caller appends. http2.Framer
// would copy the frame once more.
func (c *Conn) appendFrameHeader(n int, kind http2.FrameType, flags http2.Flags, id uint32) {
	head := [frameHeaderSize]byte{
		byte(n >> 16), byte(n >> 8), byte(n), byte(kind), byte(flags), //nolint:gosec // a frame has at most 16 MiB
		byte(id >> 24), byte(id >> 16), byte(id >> 8), byte(id), //nolint:gosec // the bytes of a number
	}
	c.append(head[:])
}

// pendingBytes is how many bytes the next flush writes.
func (c *Conn) pendingBytes() int {
	if c.pending == nil {
		return 0
	}
	return len(*c.pending) + c.external.size
}

// dropPending gives the buffers back.
func (c *Conn) dropPending() {
	if c.pending != nil {
		c.cfg.Pool.Put(c.pending)
		c.pending = nil
	}
	c.external.free()
}

// NeedsFlush reports whether there may be something to flush, and the peer reads.
func (c *Conn) NeedsFlush() bool { return c.dirty.Load() && !c.writeBuffer.full.Load() }

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
		err := c.writeOut(*pending, external)
		c.cfg.Pool.Put(pending)
		external.free()
		if err != nil {
			c.fail(err)
			break
		}
		if !c.dirty.Load() {
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
	if c.writeBuffer.full.Load() {
		return nil, externalChunks{}, nil
	}
	c.pump()
	if c.pending != nil {
		pending, external = c.pending, c.external
		c.pending, c.external = nil, externalChunks{}
		c.flushing.Store(true)
		c.dirty.Store(len(c.ready) > 0 || len(c.writable) > 0)
		return pending, external, nil
	}
	for _, s := range c.writable {
		if len(s.queue) == 0 { // else there is new data, and Writable is called after that
			writable = append(writable, s)
		}
	}
	c.writable = nil
	c.dirty.Store(false)
	return nil, externalChunks{}, writable
}
