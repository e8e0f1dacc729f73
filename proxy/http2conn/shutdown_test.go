package http2conn

import (
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

const (
	leavesSoon = `GOAWAY 2147483647 NO_ERROR "graceful_stop"`
	asks       = `PING "leaving?"`
)

// TestLeave: a client is told twice, streams that it opened before it heard of it are served, later
// ones are not, and the connection closes with the last.
func TestLeave(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var began []uint32
		h := &handler{headers: func(s *Stream, _ []hpack.HeaderField, _ bool) { began = append(began, s.id) }}
		p := serveOne(t, h, Config{})
		first := p.begin(t, h, 1, true)
		h.conn.GracefulShutdown()
		h.conn.GracefulShutdown()
		h.conn.Flush()
		p.expect(t, leavesSoon, asks)
		second := p.begin(t, h, 3, false)
		p.WritePing(true, [8]byte{'o', 't', 'h', 'e', 'r'})
		p.expect(t)
		p.WritePing(true, shutdownPing)
		p.expect(t, `GOAWAY 3 NO_ERROR "graceful_stop"`)
		p.WritePing(true, shutdownPing)
		p.headers(5, false, request)
		p.WriteData(5, true, []byte("x"))
		p.expect(t)
		first.Headers(okTrailer, true)
		h.conn.Flush()
		p.expect(t, "HEADERS 1 grpc-status=0 end")
		p.WriteData(3, true, []byte("x"))
		second.Headers(okTrailer, true)
		h.conn.Flush()
		time.Sleep(lingerTimeout)
		p.expect(t, "HEADERS 3 grpc-status=0 end", "closed")
		if err := <-p.served; err == nil || !slices.Equal(began, []uint32{1, 3}) {
			t.Errorf("Serve says %v, and began %v", err, began)
		}
	})
}

// TestLeaveAtRest: who has no streams is left as soon as it has heard.
func TestLeaveAtRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{})
		h.conn.GracefulShutdown()
		h.conn.Flush()
		p.expect(t, leavesSoon, asks)
		p.WritePing(true, shutdownPing)
		time.Sleep(lingerTimeout)
		p.expect(t, `GOAWAY 0 NO_ERROR "graceful_stop"`, "closed")
	})
}

// TestLeaveUnheard: a client that does not say that it has heard may open streams until it is
// closed.
func TestLeaveUnheard(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{headers: func(s *Stream, _ []hpack.HeaderField, _ bool) { s.Headers(okTrailer, true) }}
		p := serveOne(t, h, Config{})
		h.conn.GracefulShutdown()
		h.conn.Flush()
		p.expect(t, leavesSoon, asks)
		for id := uint32(1); id < 10; id += 2 {
			p.headers(id, true, request)
			p.expect(t, fmt.Sprint("HEADERS ", id, " grpc-status=0 end"))
		}
		h.conn.Close()
		p.expect(t, "closed")
	})
}

// TestLeaveEndsWith: in every way in which the last stream can end the connection ends.
func TestLeaveEndsWith(t *testing.T) {
	for name, end := range map[string]func(p *peer, s *Stream){
		"the end":          func(_ *peer, s *Stream) { s.Headers(okTrailer, true) },
		"data":             func(_ *peer, s *Stream) { s.Data(true, nil, []byte("x")) },
		"a reset":          func(_ *peer, s *Stream) { s.Reset(http2.ErrCodeCancel) },
		"the peer's reset": func(p *peer, _ *Stream) { p.WriteRSTStream(1, http2.ErrCodeCancel) },
		"an error":         func(p *peer, _ *Stream) { p.WriteRawFrame(http2.FrameWindowUpdate, 0, 1, make([]byte, 4)) },
		"too much":         func(p *peer, _ *Stream) { p.send(1, defaultWindow+1) },
	} {
		synctest.Test(t, func(t *testing.T) {
			h := &handler{}
			p := serveOne(t, h, Config{})
			s := p.begin(t, h, 1, false)
			h.conn.GracefulShutdown()
			h.conn.Flush()
			p.WritePing(true, shutdownPing)
			p.says(t)
			end(p, s)
			synctest.Wait()
			h.conn.Flush()
			time.Sleep(lingerTimeout)
			if got := p.says(t); len(got) == 0 || got[len(got)-1] != "closed" {
				t.Errorf("%s: the peer was sent %q", name, got)
			}
		})
	}
}

// TestLeaveLetsTheLastWordOut: the connection does not close while the last stream's end is being
// written, whatever comes meanwhile.
func TestLeaveLetsTheLastWordOut(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{})
		s := p.begin(t, h, 1, false)
		h.conn.GracefulShutdown()
		h.conn.Flush()
		p.WritePing(true, shutdownPing)
		p.says(t)
		release := p.pause()
		s.Headers(okTrailer, true)
		go h.conn.Flush()
		synctest.Wait() // it is in the middle of its write
		handled := make(chan struct{}, 10)
		h.idle = func() { handled <- struct{}{} }
		p.WriteData(1, false, []byte("more"))
		<-handled
		release()
		time.Sleep(lingerTimeout)
		p.expect(t, "HEADERS 1 grpc-status=0 end", "RST_STREAM 1 NO_ERROR", "closed")
	})
}

// TestLeaveOfWhoDoesNotAnswer: who says nothing, not even to that, is not waited for.
func TestLeaveOfWhoDoesNotAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{})
		h.conn.GracefulShutdown()
		h.conn.Flush()
		p.expect(t, leavesSoon, asks)
		time.Sleep(shutdownPingTimeout)
		p.expect(t, `GOAWAY 0 NO_ERROR "graceful_stop"`)
		time.Sleep(lingerTimeout)
		p.expect(t, "closed")
		<-p.served
	})
}
