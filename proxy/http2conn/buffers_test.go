package http2conn

import (
	"bytes"
	"slices"
	"testing"
	"testing/synctest"

	"golang.org/x/net/http2"
)

// TestBuffersComeBack: whatever ends a stream of which something waits, what it has taken over is
// given back, once. The pool is checked when the test ends.
func TestBuffersComeBack(t *testing.T) {
	for name, end := range map[string]func(t *testing.T, h *handler, p *peer, s *Stream){
		"its end": func(_ *testing.T, _ *handler, p *peer, _ *Stream) {
			p.WriteWindowUpdate(1, 1<<20)
			p.WriteWindowUpdate(0, 1<<20)
		},
		"nothing": func(*testing.T, *handler, *peer, *Stream) {},
		"a reset": func(_ *testing.T, _ *handler, _ *peer, s *Stream) {
			s.Reset(http2.ErrCodeCancel)
			s.Reset(http2.ErrCodeCancel)
		},
		"Finish":             func(_ *testing.T, _ *handler, _ *peer, s *Stream) { s.Finish(); s.Finish() },
		"the peer's reset":   func(_ *testing.T, _ *handler, p *peer, _ *Stream) { p.WriteRSTStream(1, http2.ErrCodeCancel) },
		"Close":              func(_ *testing.T, h *handler, _ *peer, _ *Stream) { h.conn.Close(); h.conn.Close() },
		"the peer's leaving": func(_ *testing.T, _ *handler, p *peer, _ *Stream) { p.conn.Close() },
		"a protocol error": func(_ *testing.T, _ *handler, p *peer, _ *Stream) {
			p.WriteRawFrame(http2.FrameWindowUpdate, 0, 0, make([]byte, 4))
		},
		"a stream error": func(_ *testing.T, _ *handler, p *peer, _ *Stream) {
			p.WriteRawFrame(http2.FrameWindowUpdate, 0, 1, make([]byte, 4))
		},
		"a refused stream": func(_ *testing.T, _ *handler, p *peer, _ *Stream) {
			p.WriteGoAway(0, http2.ErrCodeNo, nil)
		},
		"Close in a write": func(t *testing.T, h *handler, p *peer, _ *Stream) {
			defer p.pause()()
			p.WriteWindowUpdate(1, 50_000)
			synctest.Wait()
			h.conn.Close()
		},
	} {
		for _, server := range []bool{true, false} {
			for _, how := range []struct {
				flush, vectors bool
				each           int
			}{{true, false, 3000}, {false, false, 3000}, {true, true, 3000}, {true, true, 9000}, {false, true, 9000}} {
				synctest.Test(t, func(t *testing.T) {
					h := &handler{vectors: how.vectors}
					var p *peer
					var s *Stream
					if server {
						p = serveOne(t, h, Config{}, windowOf(20_000))
						s = p.begin(t, h, 1, false)
					} else {
						p = dialOne(t, h, Config{}, windowOf(20_000))
						s = h.conn.Open(nil, request, false)
					}
					s.Buffers(false, pattern(2000), p.pool.body(100_000, how.each))
					s.Data(false, pattern(2000), pattern(2000))
					s.Buffers(true, pattern(2000), p.pool.body(10_000, 3000))
					if how.flush {
						h.conn.Flush()
					}
					end(t, h, p, s)
					synctest.Wait()
					if how.flush && name == "its end" {
						same(t, name, p.took(1)[:102_000], slices.Concat(pattern(2000), pattern(100_000)))
					}
					s.Buffers(true, pattern(2000), p.pool.body(10_000, 3000))
					s.Data(true, pattern(2000), pattern(2000))
					s.Headers(okTrailer, true)
					if goesOn := name == "nothing" || name == "a refused stream" && server; !goesOn && s.HasQueued() {
						t.Errorf("%s, server %t: something waits", name, server)
					}
				})
			}
		}
	}
}

// TestNothingGathersAfterClose: who still reads a connection that was closed takes no buffer for
// what nobody will send.
func TestNothingGathersAfterClose(t *testing.T) {
	for name, say := range map[string]func(f *http2.Framer){
		"settings": func(f *http2.Framer) { f.WriteSettings(windowOf(3)) },
		"ping":     func(f *http2.Framer) { f.WritePing(false, [8]byte{1}) },
		"data":     func(f *http2.Framer) { f.WriteData(1, false, make([]byte, 100)) },
		"window":   func(f *http2.Framer) { f.WriteWindowUpdate(1, 100) },
		"reset":    func(f *http2.Framer) { f.WriteRSTStream(1, http2.ErrCodeNo) },
		"goaway":   func(f *http2.Framer) { f.WriteGoAway(0, http2.ErrCodeNo, nil) },
		"error":    func(f *http2.Framer) { f.WriteRawFrame(http2.FrameWindowUpdate, 0, 1, make([]byte, 4)) },
	} {
		synctest.Test(t, func(t *testing.T) {
			h := &handler{}
			p := serveOne(t, h, Config{})
			p.begin(t, h, 1, false)
			h.data = func(s *Stream, _ []byte, _ bool) {
				h.conn.Close() // and more has been read
				h.conn.recv.unannounced = connWindow / 2
				s.Data(false, nil, pattern(100))
				s.Consumed(defaultWindow)
			}
			var all bytes.Buffer // in one write, so that it is read at once
			f := http2.NewFramer(&all, nil)
			f.WriteData(1, false, []byte("x"))
			say(f)
			// an error, so that nothing is flushed any more
			f.WriteRawFrame(http2.FramePing, 0, 1, nil)
			p.conn.Write(all.Bytes())
			synctest.Wait()
			if n := p.pool.out(); n > 0 {
				t.Errorf("%s: %d buffers are out", name, n)
			}
		})
	}
}
