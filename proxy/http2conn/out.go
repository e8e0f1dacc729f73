package http2conn

// gatherer takes the frames of http2.Framer.
type gatherer Conn

// Write implements io.Writer.
func (g *gatherer) Write(b []byte) (int, error) {
	(*Conn)(g).append(b)
	return len(b), nil
}

// append gathers b, while there is somebody to send it to.
func (c *Conn) append(b []byte) {
	if c.closed {
		return
	}
	c.dirty.Store(true)
	have := c.out
	need := len(b)
	if have != nil {
		need += len(*have)
	}
	if have == nil || need > cap(*have) {
		size := max(need, minOut)
		if have != nil {
			size = max(need, 2*cap(*have))
		}
		c.out = c.cfg.Pool.Get(size)
		*c.out = (*c.out)[:0]
		if have != nil {
			*c.out = append(*c.out, *have...)
			c.cfg.Pool.Put(have)
		}
	}
	*c.out = append(*c.out, b...)
}

// gathered is how many bytes are to be written.
func (c *Conn) gathered() int {
	if c.out == nil {
		return 0
	}
	return len(*c.out) + c.apart.size
}

// drop gives the buffers back.
func (c *Conn) drop() {
	if c.out != nil {
		c.cfg.Pool.Put(c.out)
		c.out = nil
	}
	c.apart.free()
}

// NeedsFlush reports whether there may be something to flush that can be.
func (c *Conn) NeedsFlush() bool { return c.dirty.Load() && !c.outlet.full.Load() }

// Flush writes what has gathered, and does not wait for the peer: while that takes nothing it goes on gathering, until [Handler] is told that it is idle. An error ends the connection, which
// [Conn.Serve] tells.
func (c *Conn) Flush() {
	if !c.NeedsFlush() {
		return
	}
	var drained []*Stream
	c.writing.Lock()
	for {
		c.mu.Lock()
		if c.outlet.full.Load() {
			c.busy = false
			c.mu.Unlock()
			break
		}
		c.pump()
		out, apart := c.out, c.apart
		c.out, c.apart = nil, aparts{}
		if out == nil {
			for _, s := range c.drained {
				if len(s.queue) == 0 { // else more has come, and Writable is called when that has gone
					drained = append(drained, s)
				}
			}
			c.drained = nil
			c.dirty.Store(false)
			c.busy = false
			c.mu.Unlock()
			break
		}
		c.busy = true
		c.mu.Unlock()
		err := c.writeOut(*out, apart)
		c.cfg.Pool.Put(out)
		apart.free()
		if err != nil {
			c.fail(err)
			break
		}
	}
	c.writing.Unlock()
	for _, s := range drained {
		c.cfg.Handler.Writable(s)
	}
	c.closeIfDone()
}
