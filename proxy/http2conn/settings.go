package http2conn

import (
	"math"

	"golang.org/x/net/http2"
)

// settingsWork is how many stream windows a client may have changed by SETTINGS frames, beyond one
// for each byte that it sends: a frame of 15 bytes changes the windows of all its streams.
const settingsWork = 1 << 20

// settings applies a SETTINGS frame. Of a value that is given more than once only the last one
// counts (RFC 9113, section 6.5.3), so that the windows of all streams change once at most.
func (c *Conn) settings(f *http2.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	initial := c.peerInitialWindow
	err := f.ForeachSetting(func(s http2.Setting) error {
		if err := s.Valid(); err != nil {
			return err
		}
		switch s.ID {
		case http2.SettingInitialWindowSize:
			initial = int64(s.Val)
		case http2.SettingMaxFrameSize:
			c.peerMaxFrame = min(max(int(s.Val), maxFrameSize), flushLimit/2)
		case http2.SettingMaxConcurrentStreams:
			c.peerMaxStreams = s.Val
		case http2.SettingHeaderTableSize:
			c.encoder.setTableSize(min(s.Val, tableSize))
		}
		return nil
	})
	if err != nil {
		return err
	}
	if err := c.moveWindows(initial - c.peerInitialWindow); err != nil {
		return err
	}
	c.peerInitialWindow = initial
	_ = c.write.WriteSettingsAck()
	c.pump()
	return nil
}

// moveWindows changes the windows of all streams. The caller holds mu.
func (c *Conn) moveWindows(delta int64) error {
	if delta == 0 {
		return nil
	}
	if c.windowChanges += int64(len(c.streams)); c.server && c.windowChanges > settingsWork+c.bytesRead {
		return &violation{http2.ErrCodeEnhanceYourCalm, textSettings}
	}
	for _, s := range c.streams {
		if s.sendWindow += delta; s.sendWindow > math.MaxInt32 {
			return &violation{http2.ErrCodeFlowControl, textWindow}
		}
		c.enqueue(s)
	}
	return nil
}
