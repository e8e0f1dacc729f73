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
func (r *receiver) settings(f *http2.SettingsFrame) error {
	if f.IsAck() {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	initial := r.send.initialWindow
	err := f.ForeachSetting(func(s http2.Setting) error {
		if err := s.Valid(); err != nil {
			return err
		}
		switch s.ID {
		case http2.SettingInitialWindowSize:
			initial = int64(s.Val)
		case http2.SettingMaxFrameSize:
			r.send.maxFrame = min(max(int(s.Val), maxFrameSize), flushLimit/2)
		case http2.SettingMaxConcurrentStreams:
			r.peerMaxStreams = s.Val
		case http2.SettingHeaderTableSize:
			r.out.encoder.setTableSize(min(s.Val, tableSize))
		}
		return nil
	})
	if err != nil {
		return err
	}
	delta := initial - r.send.initialWindow
	if delta != 0 {
		r.windowChanges += int64(len(r.streams))
	}
	if r.server && r.windowChanges > settingsWork+r.bytesRead {
		return &violation{http2.ErrCodeEnhanceYourCalm, textSettings}
	}
	if err := r.send.moveWindows(delta); err != nil {
		return err
	}
	r.send.initialWindow = initial
	_ = r.out.framer.WriteSettingsAck()
	r.send.sendReady()
	return nil
}

// moveWindows changes the windows of all streams. The caller holds mu.
func (d *sender) moveWindows(delta int64) error {
	if delta == 0 {
		return nil
	}
	for _, s := range d.conn.streams {
		if s.sendWindow += delta; s.sendWindow > math.MaxInt32 {
			return &violation{http2.ErrCodeFlowControl, textWindow}
		}
		d.enqueue(s)
	}
	return nil
}
