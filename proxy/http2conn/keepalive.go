package http2conn

import (
	"errors"
	"time"

	"golang.org/x/net/http2"
)

var (
	errKeepalive = errors.New("the peer did not answer a ping in time")
	errStalled   = errors.New("the peer takes no data")
)

// keepAlive sends a ping when the peer has been idle for KeepaliveTime. A timer compares counters,
// so that reading costs nothing.
func (c *Conn) keepAlive() {
	if c.cfg.KeepaliveTime == 0 {
		return
	}
	reads, pinged := c.reads.Load(), false
	var check func()
	check = func() {
		next := c.cfg.KeepaliveTime
		now, reading := c.reads.Load(), c.reading.Load()
		c.mu.Lock()
		permitted := len(c.streams) > 0 || c.cfg.PermitWithoutStream
		c.mu.Unlock()
		switch {
		case now != reads || !reading:
			// while this side does not read, the peer may have sent something
			reads, pinged = now, false
		case pinged:
			c.fail(errKeepalive)
			return
		case permitted:
			pinged, next = true, c.cfg.KeepaliveTimeout
			c.mu.Lock()
			if !c.closed {
				_ = c.write.WritePing(false, [8]byte{})
			}
			c.mu.Unlock()
			c.cfg.Handler.FlushNeeded()
		}
		c.setKeepaliveTimer(next, check)
	}
	c.setKeepaliveTimer(c.cfg.KeepaliveTime, check)
}

func (c *Conn) setKeepaliveTimer(d time.Duration, check func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.closed {
		c.keepaliveTimer = time.AfterFunc(d, check)
	}
}

// startIdleTimer has a client close a connection that stays without streams. The caller holds mu.
func (c *Conn) startIdleTimer() {
	if c.cfg.IdleTimeout == 0 || c.closed || len(c.streams) > 0 {
		return
	}
	if c.idleTimer != nil {
		c.idleTimer.Stop()
	}
	c.idleTimer = time.AfterFunc(c.cfg.IdleTimeout, func() {
		c.mu.Lock()
		c.draining = c.draining || len(c.streams) == 0
		draining := c.draining
		c.mu.Unlock()
		if draining {
			c.closeWhenIdle.Store(true)
			c.closeIfDone()
		}
	})
}

// pings is the state of the pings that the peer sends.
type pings struct {
	last    time.Time
	strikes int
	reset   bool // this side has sent headers or data since the last ping

	// Guarded by conn.mu.
	timer *time.Timer // flushes acknowledgements that wait
	armed bool
}

// ackDelay is how long the acknowledgement of a ping waits for frames that it can leave with. A
// peer of grpc-go sends a ping with nearly every message to estimate the bandwidth, and a write for
// each acknowledgement would double the number of writes. Only a ping that follows another one
// within the same time is delayed, so that a connection with few calls needs no timer.
const ackDelay = 5 * time.Millisecond

// acknowledge writes the acknowledgement of a ping. The caller holds mu.
func (c *Conn) acknowledge(data [8]byte, now time.Time) {
	// Serve flushes before it detaches, and a peer that only sends pings gets its answers in time.
	waits := now.Sub(c.pings.last) < ackDelay && c.pendingBytes() < minWriteSize/2 && !c.dirty.Load() && !c.detaching.Load()
	_ = c.write.WritePing(true, data)
	if !waits {
		return
	}
	c.dirty.Store(false)
	switch {
	case c.pings.armed || c.closed:
		return
	case c.pings.timer == nil:
		c.pings.timer = time.AfterFunc(ackDelay, c.flushAcks)
	default:
		c.pings.timer.Reset(ackDelay)
	}
	c.pings.armed = true
}

// flushAcks has the acknowledgements flushed that still wait.
func (c *Conn) flushAcks() {
	c.mu.Lock()
	c.pings.armed = false
	waits := c.pending != nil
	if waits {
		c.dirty.Store(true)
	}
	c.mu.Unlock()
	if waits {
		c.cfg.Handler.FlushNeeded()
	}
}

// grpc-go's rules: a client that sends pings too often is sent a GOAWAY frame at the third, and
// without streams one ping in two hours is permitted.
const (
	maxPingStrikes  = 2
	idleMinInterval = 2 * time.Hour
)

// ping handles a PING frame.
func (c *Conn) ping(ack bool, data [8]byte) error {
	if ack {
		if c.server && data == shutdownPing {
			c.finishShutdown()
		}
		return nil
	}
	now := time.Now()
	c.mu.Lock()
	c.acknowledge(data, now)
	streams := len(c.streams)
	reset := c.pings.reset
	c.pings.reset = false
	c.mu.Unlock()
	since := now.Sub(c.pings.last)
	c.pings.last = now
	if !c.server || c.cfg.MinPingInterval == 0 {
		return nil
	}
	interval := c.cfg.MinPingInterval
	if streams == 0 {
		interval = idleMinInterval
	}
	switch {
	case reset:
		c.pings.strikes = 0
	case since < interval:
		c.pings.strikes++
	}
	if c.pings.strikes > maxPingStrikes {
		return &violation{http2.ErrCodeEnhanceYourCalm, "too_many_pings"}
	}
	return nil
}
