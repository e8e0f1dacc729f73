package http2conn

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/mem"
)

// TestSettingsChangeOnce: a SETTINGS frame changes the window of each stream once, whatever it
// repeats, and a frame without a net change does not look at the streams at all.
func TestSettingsChangeOnce(t *testing.T) {
	const streams, entries = 100, maxFrameSize / 6
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{})
		var all []*Stream
		for i := range uint32(streams) {
			all = append(all, p.begin(t, h, 2*i+1, true))
		}
		flapping := func(last uint32) (list []http2.Setting) {
			for i := range uint32(entries - 1) {
				list = append(list, windowOf(i%2*1000))
			}
			return append(list, windowOf(last))
		}
		p.WriteSettings(flapping(defaultWindow)...)
		p.expect(t, "SETTINGS ack")
		if h.conn.recv.windowChanges != 0 {
			t.Errorf("nothing has changed, and %d windows were", h.conn.recv.windowChanges)
		}
		p.WriteSettings(flapping(10)...)
		p.expect(t, "SETTINGS ack")
		if h.conn.recv.windowChanges != streams {
			t.Errorf("%d windows were changed, want one of each of %d streams", h.conn.recv.windowChanges, streams)
		}
		all[0].Data(false, nil, pattern(11))
		h.conn.Flush()
		p.expect(t, "DATA 1 10")
	})
}

// TestSettingsWithoutEnd: a client whose SETTINGS change the windows of many streams again and
// again is let go before that is more work than it does itself.
func TestSettingsWithoutEnd(t *testing.T) {
	const streams = 2000
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{})
		for i := range uint32(streams) {
			p.headers(2*i+1, true, request)
		}
		p.expect(t)
		var got []string
		frames := 0
		for len(got) == 0 || !strings.HasPrefix(got[len(got)-1], "GOAWAY") {
			if frames++; frames > settingsWork {
				t.Fatal("it goes on without end")
			}
			p.WriteSettings(windowOf(uint32(frames % 2)))
			got = p.says(t)
		}
		if want := []string{`GOAWAY 3999 ENHANCE_YOUR_CALM "too_many_settings"`}; !slices.Equal(got, want) {
			t.Errorf("after %d frames the client was sent %q, want %q", frames, got, want)
		}
		if least := settingsWork / streams; frames < least {
			t.Errorf("the client was let go after %d frames, and may send %d", frames, least)
		}
		if most := settingsWork + h.conn.recv.bytesRead + streams; h.conn.recv.windowChanges > most {
			t.Errorf("%d windows were changed for %d bytes", h.conn.recv.windowChanges, h.conn.recv.bytesRead)
		}
		time.Sleep(lingerTimeout)
		p.expect(t, "closed")
	})
}

// counted is a buffer that counts how often it is asked for its length.
type counted struct {
	mem.Buffer
	asked *int
}

func (c counted) Len() int { *c.asked++; return c.Buffer.Len() }

// TestWindowUpdatesByOne: to send one byte more costs the same however much waits.
func TestWindowUpdatesByOne(t *testing.T) {
	const buffers, updates = 1000, 500
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{}, windowOf(0))
		s := p.begin(t, h, 1, true)
		asked := 0
		var body mem.BufferSlice
		for range buffers {
			body = append(body, counted{mem.SliceBuffer("ab"), &asked})
		}
		s.Buffers(false, nil, body)
		asked = 0
		for range updates {
			p.WriteWindowUpdate(1, 1)
			p.expect(t, "DATA 1 1")
		}
		if asked > 2*updates {
			t.Errorf("%d frames looked at %d buffers", updates, asked)
		}
	})
}

// TestFramesWithoutEffect: frames that change nothing cost the server nothing that stays, and are
// answered by no more than one frame each.
func TestFramesWithoutEffect(t *testing.T) {
	const times = 10_000
	for name, try := range map[string]struct {
		say     func(p *peer)
		answers int // frames for each of them
	}{
		"SETTINGS":                   {func(p *peer) { p.WriteSettings() }, 1},
		"SETTINGS ack":               {func(p *peer) { p.WriteSettingsAck() }, 0},
		"PING":                       {func(p *peer) { p.WritePing(false, [8]byte{}) }, 1},
		"PING ack":                   {func(p *peer) { p.WritePing(true, [8]byte{}) }, 0},
		"PRIORITY":                   {func(p *peer) { p.WritePriority(1, http2.PriorityParam{StreamDep: 3}) }, 0},
		"WINDOW_UPDATE":              {func(p *peer) { p.WriteWindowUpdate(1, 1) }, 0},
		"WINDOW_UPDATE of all":       {func(p *peer) { p.WriteWindowUpdate(0, 1) }, 0},
		"WINDOW_UPDATE of the dead":  {func(p *peer) { p.WriteWindowUpdate(3, 1) }, 0},
		"RST_STREAM of the dead":     {func(p *peer) { p.WriteRSTStream(3, http2.ErrCodeCancel) }, 0},
		"DATA for the dead":          {func(p *peer) { p.WriteData(3, false, nil) }, 0},
		"empty DATA":                 {func(p *peer) { p.WriteData(1, false, nil) }, 0},
		"GOAWAY":                     {func(p *peer) { p.WriteGoAway(0, http2.ErrCodeNo, nil) }, 0},
		"a frame of an unknown type": {func(p *peer) { p.raw(0x55, 0xff, 0, "x") }, 0},
	} {
		synctest.Test(t, func(t *testing.T) {
			h := &handler{}
			p := serveOne(t, h, Config{})
			p.begin(t, h, 1, false)
			p.begin(t, h, 3, false).Reset(http2.ErrCodeCancel)
			h.conn.Flush()
			p.says(t)
			lent := p.pool.out()
			for range times {
				try.say(p)
			}
			time.Sleep(ackDelay) // the last acknowledgements of pings may wait for other frames
			if got := len(p.says(t)); got != times*try.answers {
				t.Errorf("%s: %d frames were answered by %d", name, times, got)
			}
			if now, streams := p.pool.out(), len(h.conn.Streams()); now > lent || streams != 1 {
				t.Errorf("%s: %d buffers are held, before %d; %d streams", name, now, lent, streams)
			}
		})
	}
}
