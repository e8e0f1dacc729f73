package h2

import (
	"fmt"
	"math"
	"time"

	"golang.org/x/net/http2"
)

// handle is what a frame does. An error ends the connection. What a peer does wrong is answered as grpc-go answers it, so that a client meets what it would meet at etcd:
// mostly the connection just closes, and some of it is passed over.
func (c *Conn) handle(f http2.Frame) error {
	switch f := f.(type) {
	case *http2.DataFrame:
		return c.data(f.FrameHeader, f.Data(), 0)
	case *http2.MetaHeadersFrame:
		return c.headers(f)
	case *http2.WindowUpdateFrame:
		c.credited(f)
	case *http2.PingFrame:
		return c.ping(f)
	case *http2.SettingsFrame:
		return c.settings(f)
	case *http2.RSTStreamFrame:
		c.reset(f)
	case *http2.GoAwayFrame:
		c.goAway(f)
	}
	return nil // PRIORITY, and what is not known
}

func (c *Conn) headers(f *http2.MetaHeadersFrame) error {
	if f.Truncated {
		c.refuse(f.StreamID, http2.ErrCodeFrameSize)
		return nil
	}
	if c.server {
		return c.begins(f)
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

// begins begins a stream of a client's.
func (c *Conn) begins(f *http2.MetaHeadersFrame) error {
	id := f.StreamID
	if id%2 != 1 || id <= c.last {
		err := fmt.Errorf("received an illegal stream id: %v. headers frame: %+v", id, f)
		c.bye(http2.ErrCodeProtocol, err.Error())
		return err
	}
	c.mu.Lock()
	c.last = id
	var s *Stream
	if id <= c.goneAt {
		s = c.newStream(id, nil)
		s.remoteEnd = f.StreamEnded()
	}
	c.mu.Unlock()
	if s != nil { // else it came after the client was told that it would not be served
		c.cfg.Handler.Headers(s, f.Fields, f.StreamEnded())
		c.closeIfDone()
	}
	return nil
}

// frame reads the next frame. That of most data is nil: it was handled out of the buffer, where http2.Framer would have copied it.
func (c *Conn) frame() (http2.Frame, error) {
	head, err := c.framer.ReadFrameHeader()
	if err != nil {
		return nil, err
	}
	if head.Type == http2.FrameData && head.StreamID != 0 && !head.Flags.Has(http2.FlagDataPadded) {
		return nil, c.data(head, nil, int(head.Length))
	}
	return c.framer.ReadFrameForHeader(head)
}

// data takes a frame of data, which has come, but for so many bytes.
func (c *Conn) data(f http2.FrameHeader, data []byte, left int) error {
	n := int(f.Length) // with the padding
	c.received += n
	end, ended, over := f.Flags.Has(http2.FlagDataEndStream), false, false
	c.mu.Lock()
	if c.received >= connWindow/2 {
		_ = c.write.WriteWindowUpdate(0, uint32(c.received)) //nolint:gosec // less than two windows
		c.received = 0
	}
	s := c.streams[f.StreamID]
	if s != nil {
		ended = s.remoteEnd
		s.taken += n
		over = s.taken > streamWindow
	}
	c.mu.Unlock()
	switch {
	case s == nil: // it has ended here
	case over:
		c.refuse(s.id, http2.ErrCodeFlowControl)
		s = nil
	case ended:
		c.refuse(s.id, http2.ErrCodeStreamClosed)
		s = nil
	default:
		if padding := n - len(data) - left; padding > 0 {
			s.Credit(padding)
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

// credited takes what the peer says it takes.
func (c *Conn) credited(f *http2.WindowUpdateFrame) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.StreamID == 0 {
		c.window = min(c.window+int64(f.Increment), math.MaxInt32)
	} else if s := c.streams[f.StreamID]; s != nil {
		s.window = min(s.window+int64(f.Increment), math.MaxInt32)
		c.enqueue(s)
	}
	c.pump()
}

func (c *Conn) settings(f *http2.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	err := f.ForeachSetting(func(s http2.Setting) error {
		switch s.ID {
		case http2.SettingInitialWindowSize:
			for _, stream := range c.streams {
				stream.window = min(stream.window+int64(s.Val)-c.initial, math.MaxInt32)
				c.enqueue(stream)
			}
			c.initial = int64(s.Val)
		case http2.SettingMaxFrameSize:
			c.maxFrame = min(max(int(s.Val), frameSize), outLimit/2)
		case http2.SettingMaxConcurrentStreams:
			c.limit = s.Val
		case http2.SettingHeaderTableSize:
			c.enc.SetMaxDynamicTableSize(min(s.Val, 4096))
		}
		return nil
	})
	if err != nil {
		return err
	}
	_ = c.write.WriteSettingsAck()
	c.pump()
	return nil
}

func (c *Conn) reset(f *http2.RSTStreamFrame) {
	c.mu.Lock()
	s := c.streams[f.StreamID]
	if s != nil {
		s.end()
	}
	c.mu.Unlock()
	if s != nil && (c.server || !s.remoteEnd) { // a server that has said all may add that it does not want to hear more
		c.cfg.Handler.Reset(s, f.ErrCode)
	}
	c.closeIfDone()
}

// refuse resets a stream for what the peer did wrong on it. There need not be one.
func (c *Conn) refuse(id uint32, code http2.ErrCode) {
	c.mu.Lock()
	s := c.streams[id]
	if s != nil {
		s.end()
	}
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
	c.cfg.Handler.Leaving()
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
	if !c.server || c.cfg.MinPing == 0 {
		return nil
	}
	now := time.Now()
	least := c.cfg.MinPing
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
		c.bye(http2.ErrCodeEnhanceYourCalm, "too_many_pings")
		return fmt.Errorf("the client sends pings more often than every %v", least)
	}
	return nil
}
