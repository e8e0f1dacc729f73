package http2conn

import (
	"errors"
	"time"
)

var errSilent = errors.New("the peer did not answer a ping in time")

// keepAlive asks a silent peer whether it is there. It does so by a timer that looks back, so that what is heard costs nothing.
func (c *Conn) keepAlive() {
	if c.cfg.KeepaliveTime == 0 {
		return
	}
	heard, asked := c.heard.Load(), false
	var look func()
	look = func() {
		now := c.heard.Load()
		next := c.cfg.KeepaliveTime
		c.mu.Lock()
		wanted := len(c.streams) > 0 || c.cfg.PermitWithoutStream
		c.mu.Unlock()
		reading := c.reading.Load()
		switch {
		case now != heard || !reading: // whoever does not listen cannot know
			heard, asked = now, false
		case asked:
			c.fail(errSilent)
			return
		case wanted:
			asked = true
			c.mu.Lock()
			if !c.closed {
				_ = c.write.WritePing(false, [8]byte{})
			}
			c.mu.Unlock()
			next = c.cfg.KeepaliveTimeout
			c.cfg.Handler.FlushNeeded()
		}
		c.mu.Lock()
		defer c.mu.Unlock()
		if !c.closed {
			c.alive = time.AfterFunc(next, look)
		}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.alive = time.AfterFunc(c.cfg.KeepaliveTime, look)
	}
}

// rest has a connection to a server leave that stays without streams. The caller holds mu.
func (c *Conn) rest() {
	if c.cfg.IdleTimeout == 0 || c.closed || len(c.streams) > 0 {
		return
	}
	if c.idle != nil {
		c.idle.Stop()
	}
	c.idle = time.AfterFunc(c.cfg.IdleTimeout, func() {
		c.mu.Lock()
		c.leaving = c.leaving || len(c.streams) == 0
		left := c.leaving
		c.mu.Unlock()
		if left {
			c.ending.Store(true)
			c.closeIfDone()
		}
	})
}
