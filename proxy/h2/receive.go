package h2

import (
	"fmt"
	"math"
	"time"

	"golang.org/x/net/http2"
)

// handle is what a frame does. A [http2.ConnectionError] is told to the peer.
func (c *Conn) handle(f http2.Frame) error {
	switch f := f.(type) {
	case *http2.DataFrame:
		return c.data(f)
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
	case *http2.GoAwayFrame:
		return c.goAway(f)
	case *http2.PushPromiseFrame:
		return http2.ConnectionError(http2.ErrCodeProtocol) // nobody asked for it
	}
	return nil // PRIORITY, and what is not known
}

func (c *Conn) headers(f *http2.MetaHeadersFrame) error {
	id, end := f.StreamID, f.StreamEnded()
	c.mu.Lock()
	s := c.streams[id]
	begins := s == nil && c.server && id > c.last
	ended := s != nil && s.remoteEnd
	if begins {
		c.last = id
		if id%2 == 1 && id <= c.goneAt && !f.Truncated {
			s = c.newStream(id, nil)
		}
	}
	if s != nil && end {
		s.remoteEnd = true
	}
	c.mu.Unlock()
	switch {
	case c.server && id%2 == 0, id > c.last && !c.server && s == nil && c.unopened(id):
		return http2.ConnectionError(http2.ErrCodeProtocol)
	case f.Truncated:
		return c.broken(http2.StreamError{StreamID: id, Code: http2.ErrCodeProtocol})
	case s == nil: // it has ended here, or came after the end was announced
		return nil
	case ended:
		return c.broken(http2.StreamError{StreamID: id, Code: http2.ErrCodeStreamClosed})
	case begins || !c.server:
		c.cfg.Handler.Headers(s, f.Fields, end)
	case end: // a client's trailer, which gRPC does not have
		c.cfg.Handler.Data(s, nil, true)
	default:
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	c.closeIfDone()
	return nil
}

// unopened says that a stream was never opened from here.
func (c *Conn) unopened(id uint32) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return id%2 == 0 || id >= c.next
}

func (c *Conn) data(f *http2.DataFrame) error {
	n := int(f.Length) // with the padding
	if c.received += n; c.received >= connWindow/2 {
		c.mu.Lock()
		_ = c.write.WriteWindowUpdate(0, uint32(c.received)) //nolint:gosec // less than two windows
		c.mu.Unlock()
		c.received = 0
	}
	c.mu.Lock()
	s := c.streams[f.StreamID]
	end, ended, over := f.StreamEnded(), false, false
	if s != nil {
		ended = s.remoteEnd
		s.taken += n
		over = s.taken > streamWindow
		s.remoteEnd = ended || end
	}
	c.mu.Unlock()
	switch {
	case s == nil && c.server && f.StreamID > c.last, s == nil && !c.server && c.unopened(f.StreamID):
		return http2.ConnectionError(http2.ErrCodeProtocol)
	case over:
		return http2.ConnectionError(http2.ErrCodeFlowControl)
	case s == nil:
		return nil
	case ended:
		return c.broken(http2.StreamError{StreamID: s.id, Code: http2.ErrCodeStreamClosed})
	}
	data := f.Data()
	s.Credit(n - len(data))
	c.cfg.Handler.Data(s, data, end)
	c.closeIfDone()
	return nil
}

// credited takes what the peer says it takes.
func (c *Conn) credited(f *http2.WindowUpdateFrame) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.StreamID == 0 {
		if c.window += int64(f.Increment); c.window > math.MaxInt32 {
			return http2.ConnectionError(http2.ErrCodeFlowControl)
		}
		c.pump()
		return nil
	}
	s := c.streams[f.StreamID]
	if s == nil {
		return nil
	}
	if s.window += int64(f.Increment); s.window > math.MaxInt32 {
		return http2.ConnectionError(http2.ErrCodeFlowControl)
	}
	c.enqueue(s)
	c.pump()
	return nil
}

func (c *Conn) settings(f *http2.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	err := f.ForeachSetting(func(s http2.Setting) error {
		if err := s.Valid(); err != nil {
			return err
		}
		switch s.ID {
		case http2.SettingInitialWindowSize:
			for _, stream := range c.streams {
				if stream.window += int64(s.Val) - c.initial; stream.window > math.MaxInt32 {
					return http2.ConnectionError(http2.ErrCodeFlowControl)
				}
				c.enqueue(stream)
			}
			c.initial = int64(s.Val)
		case http2.SettingMaxFrameSize:
			c.maxFrame = min(int(s.Val), outLimit/2)
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

func (c *Conn) reset(f *http2.RSTStreamFrame) error {
	c.mu.Lock()
	s := c.streams[f.StreamID]
	if s != nil {
		s.end()
	}
	unknown := s == nil && c.server && f.StreamID > c.last
	c.mu.Unlock()
	if unknown {
		return http2.ConnectionError(http2.ErrCodeProtocol)
	}
	if s != nil {
		c.cfg.Handler.Reset(s, f.ErrCode)
	}
	c.closeIfDone()
	return nil
}

// broken ends a stream for what the peer did wrong on it.
func (c *Conn) broken(err http2.StreamError) error {
	c.mu.Lock()
	if c.server && err.StreamID > c.last {
		c.last = err.StreamID
	}
	s := c.streams[err.StreamID]
	if s != nil {
		s.end()
	}
	if !c.closed {
		_ = c.write.WriteRSTStream(err.StreamID, err.Code)
	}
	c.mu.Unlock()
	if s != nil {
		c.cfg.Handler.Reset(s, err.Code)
	}
	return nil
}

func (c *Conn) goAway(f *http2.GoAwayFrame) error {
	if c.server {
		return nil // it opens no more streams, and those that there are go on
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
	return nil
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
