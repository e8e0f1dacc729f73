package http2conn

import (
	"math"
	"slices"
	"time"

	"golang.org/x/net/http2"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/writebuffer"
)

// stallTimeout is how long a peer may keep the connection's flow-control window closed while data
// waits for it. The write buffer closes connections that TCP is not read from for as long.
const stallTimeout = writebuffer.StallTimeout

// data handles a DATA frame, of which left bytes are still to be read.
func (r *receiver) data(f http2.FrameHeader, data []byte, left int) error {
	if r.idleStream(f.StreamID) {
		return &violation{http2.ErrCodeProtocol, textIdle}
	}
	n := int(f.Length) // with the padding
	end := f.Flags.Has(http2.FlagDataEndStream)
	// Until a frame has arrived as a whole, the stream counts as one that the peer has not ended.
	whole := left <= r.in.buffered()
	s := r.receive(f.StreamID, n, len(data)+left, end, whole)
	if padding := n - len(data) - left; s != nil && padding > 0 {
		s.Consumed(padding)
	}
	for left > 0 {
		next, err := r.in.next(left)
		if err != nil {
			return err
		}
		if left -= len(next); left > 0 && s != nil {
			r.cfg.Handler.Data(s, next, false)
		}
		data = next
	}
	if s != nil {
		if end && !whole {
			r.mu.Lock()
			s.remoteEnd = true
			r.mu.Unlock()
		}
		r.cfg.Handler.Data(s, data, end)
	}
	r.closeIfDone()
	return nil
}

// receive counts a DATA frame of n bytes, of which length are data; whole has it end the stream. It
// returns its stream, or nil
// if the data is to be ignored: this side has ended the stream, or the peer breaks a rule or a
// limit.
func (r *receiver) receive(id uint32, n, length int, end, whole bool) *Stream {
	r.unannounced += n
	code := http2.ErrCodeNo
	r.mu.Lock()
	if r.unannounced >= connWindow/2 {
		_ = r.out.framer.WriteWindowUpdate(0, uint32(r.unannounced)) //nolint:gosec // less than two windows
		r.unannounced = 0
	}
	s := r.streams[id]
	switch {
	case s != nil:
		code = s.check(n, length, end)
		s.remoteEnd = s.remoteEnd || end && whole
	case r.recentlyEnded.take(id):
		code = http2.ErrCodeStreamClosed
	}
	r.mu.Unlock()
	if code != http2.ErrCodeNo {
		r.resetStream(id, code)
		return nil
	}
	return s
}

// check returns the error of a DATA frame of n bytes, of which length are data. The caller holds
// conn.mu.
func (s *Stream) check(n, length int, end bool) http2.ErrCode {
	switch s.recvWindow -= n; {
	case s.recvWindow < 0:
		return http2.ErrCodeFlowControl
	case s.remoteEnd:
		return http2.ErrCodeStreamClosed
	case !s.receive(n):
		return http2.ErrCodeEnhanceYourCalm
	case s.declared == undeclared:
		return http2.ErrCodeNo
	}
	if s.declared -= int64(length); s.declared < 0 || end && s.declared > 0 {
		return http2.ErrCodeProtocol
	}
	return http2.ErrCodeNo
}

// Consumed returns n received bytes to the flow-control window of the stream.
func (s *Stream) Consumed(n int) {
	c := s.conn
	due := int64(c.recvWindow / 4)
	if s.ended.Load() || !c.server && s.consumed.Add(int64(n)) < due {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || s.ended.Load() {
		return
	}
	if c.server {
		s.held -= n
		c.limits.add(-n)
		if s.held+s.reserved == 0 {
			s.endGrant()
		}
		c.limits.grant()
		extra := min(n, s.extra)
		s.extra -= extra
		s.consumed.Add(int64(n - extra))
	}
	all := s.consumed.Load()
	if all < due || s.remoteEnd {
		return
	}
	_ = c.out.framer.WriteWindowUpdate(s.id, uint32(all)) //nolint:gosec // at most a window
	s.recvWindow += int(all)
	s.consumed.Add(-all)
}

// windowUpdate handles a WINDOW_UPDATE frame.
func (r *receiver) windowUpdate(id, increment uint32) error {
	if id != 0 && r.idleStream(id) {
		return &violation{http2.ErrCodeProtocol, textIdle}
	}
	r.mu.Lock()
	s, over := r.streams[id], false
	switch {
	case id == 0:
		if r.send.window += int64(increment); r.send.window > math.MaxInt32 {
			r.mu.Unlock()
			return &violation{http2.ErrCodeFlowControl, textWindow}
		}
	case s != nil:
		s.sendWindow += int64(increment)
		if over = s.sendWindow > math.MaxInt32; !over {
			r.send.enqueue(s)
		}
	}
	r.send.sendReady()
	r.mu.Unlock()
	if over {
		r.resetStream(s.id, http2.ErrCodeFlowControl)
	}
	return nil
}

// watchStall closes the connection if data waits for the connection's window for stallTimeout. The
// caller holds mu.
func (d *sender) watchStall() {
	stalled := len(d.ready) > 0 && d.window <= 0 && !d.conn.closed
	switch {
	case stalled && d.stallTimer == nil:
		d.stallTimer = time.AfterFunc(stallTimeout, d.closeStalled)
	case !stalled && d.stallTimer != nil:
		d.stallTimer.Stop()
		d.stallTimer = nil
	}
}

// closeStalled closes the connection, unless the streams whose data has waited were reset.
func (d *sender) closeStalled() {
	d.conn.mu.Lock()
	waits := slices.ContainsFunc(d.ready, func(s *Stream) bool { return !s.ended.Load() && len(s.queue) > 0 })
	d.stallTimer = nil
	d.conn.mu.Unlock()
	if waits {
		d.conn.fail(writebuffer.ErrStalled)
	}
}
