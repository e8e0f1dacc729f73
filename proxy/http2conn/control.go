package http2conn

import (
	"math"
	"time"

	"golang.org/x/net/http2"
)

// priority ignores a priority, unless it is impossible.
func (r *receiver) priority(id uint32, p http2.PriorityParam) error {
	if p.StreamDep != id || !r.server {
		return nil
	}
	r.mu.Lock()
	s := r.streams[id]
	r.mu.Unlock()
	if s == nil {
		return &violation{http2.ErrCodeProtocol, textItself}
	}
	r.resetStream(id, http2.ErrCodeProtocol)
	return nil
}

// reset handles a RST_STREAM frame.
func (r *receiver) reset(f *http2.RSTStreamFrame) error {
	if r.idleStream(f.StreamID) {
		return &violation{http2.ErrCodeProtocol, textIdle}
	}
	r.mu.Lock()
	s := r.streams[f.StreamID]
	// After its END_STREAM a server may reset the stream to say that it ignores the rest of the
	// request.
	reset := s != nil && (r.server || !s.remoteEnd)
	if s != nil {
		s.remoteEnd = s.remoteEnd || r.server
		s.end()
	} else if r.server { // it ended before, but the client sends nothing on it any more
		r.recentlyEnded.take(f.StreamID)
		r.recentlyEnded.add(f.StreamID)
	}
	r.mu.Unlock()
	if reset {
		r.cfg.Handler.Reset(s, f.ErrCode)
	}
	r.closeIfDone()
	return nil
}

// resetStream resets a stream for an error of the peer. The stream need not exist.
func (c *Conn) resetStream(id uint32, code http2.ErrCode) {
	c.mu.Lock()
	s := c.streams[id]
	if s != nil {
		s.end()
	}
	c.recentlyEnded.take(id) // the client gets its one answer now
	if !c.closed {
		_ = c.out.framer.WriteRSTStream(id, code)
	}
	c.mu.Unlock()
	if s != nil {
		c.cfg.Handler.Reset(s, code)
	}
}

// goAway handles a GOAWAY frame.
func (r *receiver) goAway(f *http2.GoAwayFrame) {
	if r.server {
		return // the client opens no more streams, and those that are open continue
	}
	r.closeWhenIdle.Store(true)
	r.mu.Lock()
	r.draining = true
	var refused []*Stream
	for id, s := range r.streams {
		if id > f.LastStreamID {
			s.end()
			refused = append(refused, s)
		}
	}
	r.mu.Unlock()
	for _, s := range refused {
		r.cfg.Handler.Reset(s, http2.ErrCodeRefusedStream)
	}
	r.cfg.Handler.GoAwayReceived()
	r.closeIfDone()
}

// shutdownPingTimeout is how long a client may take to answer the ping of a graceful shutdown.
// grpc-go waits as long: the client may be gone.
const shutdownPingTimeout = 5 * time.Second

// shutdownPing is the ping that follows the first GOAWAY frame of a graceful shutdown. Its answer
// shows that the client has read that frame.
var shutdownPing = [8]byte{'l', 'e', 'a', 'v', 'i', 'n', 'g', '?'}

// GracefulShutdown has a client open its next streams elsewhere. It sends two GOAWAY frames (RFC
// 9113, section 6.8), so that no stream is lost that the client opens before it reads the first.
// The connection closes after the last stream.
func (c *Conn) GracefulShutdown() {
	c.closeWhenIdle.Store(true)
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || c.draining {
		return
	}
	c.draining = true
	_ = c.out.framer.WriteGoAway(math.MaxInt32, http2.ErrCodeNo, []byte(textShutdown))
	_ = c.out.framer.WritePing(false, shutdownPing)
	c.shutdownTimer = time.AfterFunc(shutdownPingTimeout, func() {
		c.finishShutdown()
		c.cfg.Handler.FlushNeeded()
	})
}

// finishShutdown sends the second GOAWAY frame, with the last stream that is served.
func (c *Conn) finishShutdown() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.draining && c.lastServedID == math.MaxInt32 && !c.closed {
		c.lastServedID = c.lastStreamID
		_ = c.out.framer.WriteGoAway(c.lastStreamID, http2.ErrCodeNo, []byte(textShutdown))
	}
}
