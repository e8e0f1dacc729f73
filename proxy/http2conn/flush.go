package http2conn

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
	c.dirty.Store(true)
	have := c.pending
	need := len(b)
	if have != nil {
		need += len(*have)
	}
	if have == nil || need > cap(*have) {
		size := max(need, minWriteSize)
		if have != nil {
			size = max(need, 2*cap(*have))
		}
		c.pending = c.cfg.Pool.Get(size)
		*c.pending = (*c.pending)[:0]
		if have != nil {
			*c.pending = append(*c.pending, *have...)
			c.cfg.Pool.Put(have)
		}
	}
	*c.pending = append(*c.pending, b...)
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
	}
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
		c.flushing = false
		return nil, externalChunks{}, nil
	}
	c.pump()
	if c.pending != nil {
		pending, external = c.pending, c.external
		c.pending, c.external = nil, externalChunks{}
		c.flushing = true
		return pending, external, nil
	}
	for _, s := range c.writable {
		if len(s.queue) == 0 { // else there is new data, and Writable is called after that
			writable = append(writable, s)
		}
	}
	c.writable, c.flushing = nil, false
	c.dirty.Store(false)
	return nil, externalChunks{}, writable
}
