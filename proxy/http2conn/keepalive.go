package http2conn

import (
	"errors"
	"time"

	"golang.org/x/net/http2"
)

var (
	errKeepalive = errors.New("the peer did not answer a ping in time")
)

// keepalive sends pings to the peer and acknowledges those of the peer. The mu of the connection
// guards the timers.
type keepalive struct {
	conn      *Conn
	timer     *time.Timer
	idleTimer *time.Timer
	ackTimer  *time.Timer // flushes acknowledgements that wait
	ackArmed  bool
}

// start sends a ping when the peer has been idle for KeepaliveTime. A timer compares counters,
// so that reading costs nothing.
func (k *keepalive) start() {
	if k.conn.cfg.KeepaliveTime == 0 {
		return
	}
	reads, pinged := k.conn.reads.Load(), false
	var check func()
	check = func() {
		next := k.conn.cfg.KeepaliveTime
		now, reading := k.conn.reads.Load(), k.conn.reading.Load()
		k.conn.mu.Lock()
		permitted := len(k.conn.streams) > 0 || k.conn.cfg.PermitWithoutStream
		k.conn.mu.Unlock()
		switch {
		case now != reads || !reading:
			// while this side does not read, the peer may have sent something
			reads, pinged = now, false
		case pinged:
			k.conn.fail(errKeepalive)
			return
		case permitted:
			pinged, next = true, k.conn.cfg.KeepaliveTimeout
			k.conn.mu.Lock()
			if !k.conn.closed {
				_ = k.conn.out.framer.WritePing(false, [8]byte{})
			}
			k.conn.mu.Unlock()
			k.conn.cfg.Handler.FlushNeeded()
		}
		k.setTimer(next, check)
	}
	k.setTimer(k.conn.cfg.KeepaliveTime, check)
}

func (k *keepalive) setTimer(d time.Duration, check func()) {
	k.conn.mu.Lock()
	defer k.conn.mu.Unlock()
	if !k.conn.closed {
		k.timer = time.AfterFunc(d, check)
	}
}

// startIdleTimer has a client close a connection that stays without streams. The caller holds mu.
func (k *keepalive) startIdleTimer() {
	if k.conn.cfg.IdleTimeout == 0 || k.conn.closed || len(k.conn.streams) > 0 {
		return
	}
	if k.idleTimer != nil {
		k.idleTimer.Stop()
	}
	k.idleTimer = time.AfterFunc(k.conn.cfg.IdleTimeout, func() {
		k.conn.mu.Lock()
		k.conn.draining = k.conn.draining || len(k.conn.streams) == 0
		draining := k.conn.draining
		k.conn.mu.Unlock()
		if draining {
			k.conn.closeWhenIdle.Store(true)
			k.conn.closeIfDone()
		}
	})
}

// pings is the state of the pings that the peer sends.
type pings struct {
	last    time.Time
	strikes int
}

// ackDelay is how long the acknowledgement of a ping waits for frames that it can leave with. A
// peer of grpc-go sends a ping with nearly every message to estimate the bandwidth, and a write for
// each acknowledgement would double the number of writes. It is longer than a call of a busy client
// takes, or the timer would expire between calls. Only a ping that follows another one within the
// same time is delayed, so that a connection with few calls needs no timer.
const ackDelay = 25 * time.Millisecond

// acknowledge writes the acknowledgement of a ping, which may wait if the ping has come soon after
// another one. The caller holds mu.
func (k *keepalive) acknowledge(data [8]byte, soon bool) {
	out := &k.conn.out
	// Serve flushes before it detaches, and a peer that only sends pings gets its answers in time.
	waits := soon && out.size() < minWriteSize/2 && !out.dirty.Load() && !k.conn.detaching.Load()
	out.frameHeader(len(data), http2.FramePing, http2.FlagPingAck, 0)
	out.append(data[:])
	if !waits {
		return
	}
	out.dirty.Store(false)
	switch {
	case k.ackArmed || k.conn.closed:
		return
	case k.ackTimer == nil:
		k.ackTimer = time.AfterFunc(ackDelay, k.flushAcks)
	default:
		k.ackTimer.Reset(ackDelay)
	}
	k.ackArmed = true
}

// flushAcks has the acknowledgements flushed that still wait.
func (k *keepalive) flushAcks() {
	k.conn.mu.Lock()
	k.ackArmed = false
	waits := k.conn.out.pending != nil
	if waits {
		k.conn.out.dirty.Store(true)
	}
	k.conn.mu.Unlock()
	if waits {
		k.conn.cfg.Handler.FlushNeeded()
	}
}

// grpc-go's rules: a client that sends pings too often is sent a GOAWAY frame at the third, and
// without streams one ping in two hours is permitted.
const (
	maxPingStrikes  = 2
	idleMinInterval = 2 * time.Hour
)

// ping handles a PING frame.
func (r *receiver) ping(ack bool, data [8]byte) error {
	if ack {
		if r.server && data == shutdownPing {
			r.finishShutdown()
		}
		return nil
	}
	now := time.Now()
	since := now.Sub(r.pings.last)
	r.pings.last = now
	r.mu.Lock()
	r.keepalive.acknowledge(data, since < ackDelay)
	streams := len(r.streams)
	active := r.send.active
	r.send.active = false
	r.mu.Unlock()
	if !r.server || r.cfg.MinPingInterval == 0 {
		return nil
	}
	interval := r.cfg.MinPingInterval
	if streams == 0 {
		interval = idleMinInterval
	}
	switch {
	case active:
		r.pings.strikes = 0
	case since < interval:
		r.pings.strikes++
	}
	if r.pings.strikes > maxPingStrikes {
		return &violation{http2.ErrCodeEnhanceYourCalm, "too_many_pings"}
	}
	return nil
}
