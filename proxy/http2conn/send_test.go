package http2conn

import (
	"fmt"
	"testing"
	"testing/synctest"

	"golang.org/x/net/http2"
	"google.golang.org/grpc/mem"
)

// dataFrames is how n bytes are sent that everything has room for.
func dataFrames(id, n int, end bool) (frames []string) {
	for ; n > maxFrameSize; n -= maxFrameSize {
		frames = append(frames, fmt.Sprint("DATA ", id, " ", maxFrameSize))
	}
	last := fmt.Sprint("DATA ", id, " ", n)
	if end {
		last += " end"
	}
	return append(frames, last)
}

var windowOf = func(n uint32) http2.Setting { return http2.Setting{ID: http2.SettingInitialWindowSize, Val: n} }

// TestSizes sends bodies of sizes where frames and windows end, in all the ways that there are to
// send them, and to end them.
func TestSizes(t *testing.T) {
	for _, n := range []int{0, 1, 5, maxFrameSize - 1, maxFrameSize, maxFrameSize + 1, 2 * maxFrameSize, defaultWindow - 1, defaultWindow} {
		for _, way := range []string{"data", "head and data", "buffers", "small buffers"} {
			for _, trailer := range []bool{false, true} {
				synctest.Test(t, func(t *testing.T) {
					h := &handler{}
					p := serveOne(t, h, Config{})
					s := p.begin(t, h, 1, true)
					whole := true
					switch way {
					case "data":
						whole = s.Data(!trailer, nil, pattern(n))
					case "head and data":
						whole = s.Data(!trailer, pattern(n)[:min(n, 5)], pattern(n)[min(n, 5):])
					case "buffers":
						whole = s.Buffers(!trailer, nil, p.pool.body(n, n))
					case "small buffers":
						whole = s.Buffers(!trailer, nil, p.pool.body(n, 4000))
					}
					if !whole || s.HasQueued() {
						t.Errorf("%d bytes as %s wait", n, way)
					}
					var want []string
					if n > 0 || !trailer {
						want = dataFrames(1, n, !trailer)
					}
					if trailer {
						s.Headers(okTrailer, true)
						want = append(want, "HEADERS 1 grpc-status=0 end")
					}
					h.conn.Flush()
					p.expect(t, want...)
					same(t, way, p.took(1), pattern(n))
					if n := len(h.conn.Streams()); n > 0 {
						t.Errorf("%d streams are left", n)
					}
				})
			}
		}
	}
}

// TestEmptyBuffers: where there is nothing to send, no window has to open for it.
func TestEmptyBuffers(t *testing.T) {
	for name, body := range map[string]mem.BufferSlice{"none": nil, "empty ones": {mem.SliceBuffer(nil), mem.SliceBuffer{}}} {
		synctest.Test(t, func(t *testing.T) {
			h := &handler{}
			p := serveOne(t, h, Config{}, windowOf(0))
			s := p.begin(t, h, 1, true)
			if !s.Buffers(false, nil, body) || s.HasQueued() {
				t.Errorf("%s: they wait", name)
			}
			p.expect(t)
			if !s.Buffers(true, nil, body) {
				t.Errorf("%s: the end waits", name)
			}
			h.conn.Flush()
			p.expect(t, "DATA 1 0 end")
		})
	}
}

// TestSmallWindows lets out what a window takes, however it was opened, and the rest when it opens
// further.
func TestSmallWindows(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{}, windowOf(0))
		s := p.begin(t, h, 1, true)
		if s.Data(false, []byte("head"), []byte("body")) || !s.HasQueued() {
			t.Error("a window of nothing takes something")
		}
		s.Headers(okTrailer, true)
		s.Data(false, nil, []byte("what comes after the trailer is not sent"))
		h.conn.Flush()
		p.expect(t)
		p.WriteWindowUpdate(1, 1)
		p.expect(t, "DATA 1 1")
		p.WriteSettings(windowOf(3))
		p.expect(t, "SETTINGS ack", "DATA 1 3")
		p.WriteSettings(windowOf(0))
		p.expect(t, "SETTINGS ack")
		p.WriteWindowUpdate(1, 3) // its window is -3
		p.expect(t)
		p.WriteWindowUpdate(1, 2)
		p.expect(t, "DATA 1 2")
		if !s.HasQueued() {
			t.Error("nothing waits")
		}
		p.WriteWindowUpdate(1, 100)
		p.expect(t, "DATA 1 2", "HEADERS 1 grpc-status=0 end")
		if got := string(p.took(1)); got != "headbody" || s.HasQueued() {
			t.Errorf("got %q, and it waits: %t", got, s.HasQueued())
		}
	})
}

// TestWindowThatShrinks: a stream that stood in line is passed over while its window is closed.
func TestWindowThatShrinks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{})
		first, second := p.begin(t, h, 1, true), p.begin(t, h, 3, true)
		first.Data(false, nil, pattern(defaultWindow-10)) // of the connection's window, 10 are left
		second.Data(false, nil, pattern(100))
		first.Data(true, nil, pattern(20))
		h.conn.Flush()
		p.expect(t, append(dataFrames(1, defaultWindow-10, false), "DATA 3 10")...)
		p.WriteSettings(windowOf(10))
		p.WriteWindowUpdate(0, 1000)
		p.expect(t, "SETTINGS ack")
		p.WriteWindowUpdate(3, 1)
		p.expect(t, "DATA 3 1")
		p.WriteWindowUpdate(1, defaultWindow-10)
		p.expect(t, "DATA 1 10")
		p.WriteWindowUpdate(3, 1000)
		p.expect(t, "DATA 3 89")
		p.WriteWindowUpdate(1, 1000)
		p.expect(t, "DATA 1 10 end")
	})
}

// TestTurns: streams share what the connection takes, one frame each in turns, in any order of
// arrival and has most.
func TestTurns(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{}, windowOf(1<<20))
		var all []*Stream
		for i := range uint32(4) {
			all = append(all, p.begin(t, h, 2*i+1, true))
		}
		all[0].Data(false, nil, pattern(defaultWindow))
		h.conn.Flush()
		p.expect(t, dataFrames(1, defaultWindow, false)...)
		for _, s := range all {
			s.Data(false, nil, pattern(2*maxFrameSize))
		}
		for round, id := range []int{1, 3, 5, 7, 1, 3, 5, 7, 1} {
			p.WriteWindowUpdate(0, 1)
			if got := p.says(t); len(got) != 1 || got[0] != fmt.Sprint("DATA ", id, " 1") {
				t.Fatalf("byte %d: %q", round, got)
			}
		}
		p.WriteWindowUpdate(0, 6*maxFrameSize)
		p.expect(t, "DATA 3 16384", "DATA 5 16384", "DATA 7 16384", "DATA 1 16384", "DATA 3 16382", "DATA 5 16382", "DATA 7 4")
		p.WriteWindowUpdate(0, 1<<20)
		p.expect(t, "DATA 1 16381", "DATA 7 16378")
	})
}
