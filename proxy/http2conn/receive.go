package http2conn

import (
	"fmt"
	"math"
	"time"

	"golang.org/x/net/http2"
)

// handle is what a frame does. An error ends the connection. Where etcd's server just closes the
// connection, the client is told why; otherwise it meets what it would meet at etcd.
func (c *Conn) handle(f http2.Frame) error {
	switch f := f.(type) {
	case *http2.DataFrame:
		return c.data(f.FrameHeader, f.Data(), 0)
	case *http2.MetaHeadersFrame:
		return c.headers(f)
	case *http2.WindowUpdateFrame:
		return c.credited(f)
	case *http2.PingFrame:
		return c.ping(f)
	case *http2.SettingsFrame:
		return c.settings(f)
	case *http2.RSTStreamFrame:
		return c.reset(f)
	case *http2.PriorityFrame:
		return c.priority(f.StreamID, f.PriorityParam)
	case *http2.PushPromiseFrame:
		if c.server {
			return &violation{http2.ErrCodeProtocol, textPush}
		}
	case *http2.GoAwayFrame:
		c.goAway(f)
	}
	return nil // what is not known
}

func (c *Conn) headers(f *http2.MetaHeadersFrame) error {
	if c.server {
		return c.begins(f)
	}
	if f.Truncated {
		c.refuse(f.StreamID, http2.ErrCodeFrameSize)
		return nil
	}
	c.mu.Lock()
	s := c.streams[f.StreamID]
	ended := s != nil && s.remoteEnd
	if s != nil && f.StreamEnded() {
		s.remoteEnd = true
	}
	c.mu.Unlock()
	switch {
	case s == nil: // it has ended here
	case ended:
		c.refuse(s.id, http2.ErrCodeStreamClosed)
	default:
		c.cfg.Handler.Headers(s, f.Fields, f.StreamEnded())
	}
	return nil
}

// begins begins a stream of a client's, or ends one by a trailer.
func (c *Conn) begins(f *http2.MetaHeadersFrame) error {
	id := f.StreamID
	if id <= c.last {
		c.mu.Lock()
		s := c.streams[id]
		c.mu.Unlock()
		if s != nil {
			c.trailer(s, f)
			return nil
		}
	}
	if id%2 != 1 || id <= c.last {
		return &violation{http2.ErrCodeProtocol, fmt.Sprintf("received an illegal stream id: %v. headers frame: %+v", id, f)}
	}
	length, code := int64(undeclared), http2.ErrCodeNo
	if c.cfg.Strict {
		var ok bool
		if length, ok = checkRequest(f.Fields); !ok || f.StreamEnded() && length > 0 {
			code = http2.ErrCodeProtocol
		}
	}
	if f.HasPriority() && f.Priority.StreamDep == id {
		code = http2.ErrCodeProtocol
	}
	if f.Truncated {
		code = http2.ErrCodeFrameSize
	}
	c.mu.Lock()
	c.last = id
	var s *Stream
	if code == http2.ErrCodeNo && id <= c.goneAt {
		s = c.newStream(id, nil)
		s.remoteEnd, s.declared = f.StreamEnded(), length
	}
	c.mu.Unlock()
	if code != http2.ErrCodeNo {
		c.refuse(id, code)
		return nil
	}
	if s != nil { // else it came after the client was told that it would not be served
		c.cfg.Handler.Headers(s, f.Fields, f.StreamEnded())
		c.closeIfDone()
	}
	return nil
}

// trailer ends a request by header fields, which gRPC has no use for.
func (c *Conn) trailer(s *Stream, f *http2.MetaHeadersFrame) {
	c.mu.Lock()
	code := http2.ErrCodeNo
	switch {
	case s.remoteEnd:
		code = http2.ErrCodeStreamClosed
	case f.Truncated:
		code = http2.ErrCodeFrameSize
	case !f.StreamEnded(), s.declared > 0, len(f.PseudoFields()) > 0:
		code = http2.ErrCodeProtocol
	default:
		s.remoteEnd = true
	}
	c.mu.Unlock()
	if code != http2.ErrCodeNo {
		c.refuse(s.id, code)
		return
	}
	c.cfg.Handler.Data(s, nil, true)
	c.closeIfDone()
}

// priority passes over a priority, but for one that cannot be.
func (c *Conn) priority(id uint32, p http2.PriorityParam) error {
	if p.StreamDep != id || !c.server {
		return nil
	}
	c.mu.Lock()
	s := c.streams[id]
	c.mu.Unlock()
	if s == nil {
		return &violation{http2.ErrCodeProtocol, textItself}
	}
	c.refuse(id, http2.ErrCodeProtocol)
	return nil
}

// frame reads the next frame. That of most data is nil: it was handled out of the buffer, where http2.Framer would have copied it.
func (c *Conn) frame() (http2.Frame, error) {
	head, err := c.framer.ReadFrameHeader()
	if err != nil {
		return nil, err
	}
	c.head = head
	if head.Type == http2.FrameData && head.StreamID != 0 && !head.Flags.Has(http2.FlagDataPadded) {
		return nil, c.data(head, nil, int(head.Length))
	}
	return c.framer.ReadFrameForHeader(head)
}

// data takes a frame of data, which has come, but for so many bytes.
func (c *Conn) data(f http2.FrameHeader, data []byte, left int) error {
	if c.idleStream(f.StreamID) {
		return &violation{http2.ErrCodeProtocol, textIdle}
	}
	n := int(f.Length) // with the padding
	c.received += n
	end, code := f.Flags.Has(http2.FlagDataEndStream), http2.ErrCodeNo
	c.mu.Lock()
	if c.received >= connWindow/2 {
		_ = c.write.WriteWindowUpdate(0, uint32(c.received)) //nolint:gosec // less than two windows
		c.received = 0
	}
	s := c.streams[f.StreamID]
	switch {
	case s != nil:
		code = s.accept(n, len(data)+left, end)
	case c.gone.take(f.StreamID):
		code = http2.ErrCodeStreamClosed
	}
	c.mu.Unlock()
	switch {
	case code != http2.ErrCodeNo:
		c.refuse(f.StreamID, code)
		s = nil
	case s != nil:
		if padding := n - len(data) - left; padding > 0 {
			s.Consumed(padding)
		}
	}
	for left > 0 {
		next, err := c.in.next(left)
		if err != nil {
			return err
		}
		if left -= len(next); left > 0 && s != nil {
			c.cfg.Handler.Data(s, next, false)
		}
		data = next
	}
	if s != nil {
		if end {
			c.mu.Lock()
			s.remoteEnd = true
			c.mu.Unlock()
		}
		c.cfg.Handler.Data(s, data, end)
	}
	c.closeIfDone()
	return nil
}

// accept counts a frame of so many bytes, of which length are data. The caller holds conn.mu.
func (s *Stream) accept(bytes, length int, end bool) http2.ErrCode {
	if s.taken += bytes; s.taken > streamWindow {
		return http2.ErrCodeFlowControl
	}
	if s.remoteEnd {
		return http2.ErrCodeStreamClosed
	}
	if s.declared == undeclared {
		return http2.ErrCodeNo
	}
	if s.declared -= int64(length); s.declared < 0 || end && s.declared > 0 {
		return http2.ErrCodeProtocol
	}
	return http2.ErrCodeNo
}

// credited takes what the peer says it takes.
func (c *Conn) credited(f *http2.WindowUpdateFrame) error {
	if f.StreamID != 0 && c.idleStream(f.StreamID) {
		return &violation{http2.ErrCodeProtocol, textIdle}
	}
	c.mu.Lock()
	s, over := c.streams[f.StreamID], false
	switch {
	case f.StreamID == 0:
		if c.window += int64(f.Increment); c.window > math.MaxInt32 {
			c.mu.Unlock()
			return &violation{http2.ErrCodeFlowControl, textWindow}
		}
	case s != nil:
		s.window += int64(f.Increment)
		if over = s.window > math.MaxInt32; !over {
			c.enqueue(s)
		}
	}
	c.pump()
	c.mu.Unlock()
	if over {
		c.refuse(s.id, http2.ErrCodeFlowControl)
	}
	return nil
}

func (c *Conn) reset(f *http2.RSTStreamFrame) error {
	if c.idleStream(f.StreamID) {
		return &violation{http2.ErrCodeProtocol, textIdle}
	}
	c.mu.Lock()
	s := c.streams[f.StreamID]
	told := s != nil && (c.server || !s.remoteEnd) // a server that has said all may add that it does not want to hear more
	if s != nil {
		s.remoteEnd = s.remoteEnd || c.server
		s.end()
	}
	c.mu.Unlock()
	if told {
		c.cfg.Handler.Reset(s, f.ErrCode)
	}
	c.closeIfDone()
	return nil
}

// refuse resets a stream for what the peer did wrong on it. There need not be one.
func (c *Conn) refuse(id uint32, code http2.ErrCode) {
	c.mu.Lock()
	s := c.streams[id]
	if s != nil {
		s.end()
	}
	c.gone.take(id) // the client is told now
	if !c.closed {
		_ = c.write.WriteRSTStream(id, code)
	}
	c.mu.Unlock()
	if s != nil {
		c.cfg.Handler.Reset(s, code)
	}
}

func (c *Conn) goAway(f *http2.GoAwayFrame) {
	if c.server {
		return // it opens no more streams, and those that there are go on
	}
	c.ending.Store(true)
	c.mu.Lock()
	c.leaving = true
	var refused []*Stream
	for id, s := range c.streams {
		if id > f.LastStreamID {
			s.end()
			refused = append(refused, s)
		}
	}
	c.mu.Unlock()
	for _, s := range refused {
		c.cfg.Handler.Reset(s, http2.ErrCodeRefusedStream)
	}
	c.cfg.Handler.GoAwayReceived()
	c.closeIfDone()
}

// pings are what a client has sent of them.
type pings struct {
	last    time.Time
	strikes int
	excused bool // something was sent to the client since
}

// Who sends pings more often than it may is sent away at the third, and who has no streams may send one in two hours: grpc-go's rules.
const (
	maxStrikes = 2
	idlePing   = 2 * time.Hour
)

// leavingPing is the ping whose answer says that the client has heard that the server leaves.
var leavingPing = [8]byte{'l', 'e', 'a', 'v', 'i', 'n', 'g', '?'}

func (c *Conn) ping(f *http2.PingFrame) error {
	if f.IsAck() {
		if c.server && f.Data == leavingPing {
			c.left()
		}
		return nil
	}
	c.mu.Lock()
	_ = c.write.WritePing(true, f.Data)
	streams := len(c.streams)
	excused := c.pings.excused
	c.pings.excused = false
	c.mu.Unlock()
	if !c.server || c.cfg.MinPingInterval == 0 {
		return nil
	}
	now := time.Now()
	least := c.cfg.MinPingInterval
	if streams == 0 {
		least = idlePing
	}
	switch {
	case excused:
		c.pings.strikes = 0
	case now.Sub(c.pings.last) < least:
		c.pings.strikes++
	}
	c.pings.last = now
	if c.pings.strikes > maxStrikes {
		return &violation{http2.ErrCodeEnhanceYourCalm, "too_many_pings"}
	}
	return nil
}
