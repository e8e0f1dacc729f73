package http2conn

import (
	"errors"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/writebuffer"
)

const asksLife = `PING ""`

// TestSilentPeer is asked after a silence, and left if it does not answer.
func TestSilentPeer(t *testing.T) {
	for _, server := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			h := &handler{}
			cfg := Config{KeepaliveTime: time.Minute, KeepaliveTimeout: 10 * time.Second, PermitWithoutStream: true}
			var p *peer
			if server {
				p = serveOne(t, h, cfg)
			} else {
				p = dialOne(t, h, cfg)
			}
			p.says(t)
			begun := time.Now()
			time.Sleep(time.Minute) // within it the peer has sent its settings
			p.expect(t)
			time.Sleep(time.Minute)
			p.expect(t, asksLife)
			time.Sleep(10*time.Second - 1)
			p.expect(t)
			if err := wait(t, p.served, "end"); !errors.Is(err, errKeepalive) {
				t.Errorf("Serve says %v", err)
			}
			p.expect(t, "closed")
			if got := time.Since(begun); got != 130*time.Second {
				t.Errorf("it ended after %v", got)
			}
		})
	}
}

// TestPeerThatSpeaks is not asked while it does, whatever it says, and stays while it answers.
func TestPeerThatSpeaks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{KeepaliveTime: time.Minute, KeepaliveTimeout: 10 * time.Second, PermitWithoutStream: true})
		for range 100 {
			time.Sleep(59 * time.Second)
			p.WriteWindowUpdate(0, 1)
		}
		p.expect(t)
		for range 100 {
			for asked := false; !asked; {
				time.Sleep(9 * time.Second)
				asked = slices.Equal(p.says(t), []string{asksLife})
			}
			p.WritePing(true, [8]byte{})
			p.says(t)
		}
	})
}

// TestNoPingWithoutStreams unless that is asked for.
func TestNoPingWithoutStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := dialOne(t, h, Config{KeepaliveTime: time.Minute, KeepaliveTimeout: 10 * time.Second})
		p.says(t)
		time.Sleep(time.Hour + 30*time.Second)
		p.expect(t)
		s := h.conn.Open(nil, request, true)
		h.conn.Flush()
		p.says(t)
		time.Sleep(30 * time.Second)
		p.expect(t, asksLife) // it was silent for an hour
		p.WritePing(true, [8]byte{})
		s.Reset(http2.ErrCodeCancel)
		h.conn.Flush()
		p.expect(t, "RST_STREAM 1 CANCEL")
		time.Sleep(time.Hour)
		p.expect(t)
	})
}

// TestSilenceOfWhoDoesNotListen: who has not listened does not know whether the peer was silent.
func TestSilenceOfWhoDoesNotListen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{data: func(*Stream, []byte, bool) { time.Sleep(time.Hour - 30*time.Second) }}
		p := serveOne(t, h, Config{KeepaliveTime: time.Minute, KeepaliveTimeout: 10 * time.Second, PermitWithoutStream: true})
		p.begin(t, h, 1, false)
		p.WriteData(1, false, []byte("x"))
		time.Sleep(time.Hour - 1)
		p.expect(t)
		time.Sleep(5 * time.Second) // it listens, and asks before it judges
		p.expect(t, asksLife)
		p.WritePing(true, [8]byte{})
		time.Sleep(time.Minute)
		p.expect(t)
	})
}

// TestSilentPeerThatDoesNotRead is left like any: the ping is never written.
func TestSilentPeerThatDoesNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{KeepaliveTime: time.Minute, KeepaliveTimeout: 10 * time.Second, PermitWithoutStream: true})
		defer p.pause()()
		time.Sleep(2*time.Minute + 10*time.Second)
		if err := wait(t, p.served, "end"); !errors.Is(err, errKeepalive) {
			t.Errorf("Serve says %v", err)
		}
	})
}

// TestPeerThatReadsNothing: the connection closes when data waits for it for a minute, and not
// while it reads a little.
func TestPeerThatReadsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{data: func(s *Stream, _ []byte, _ bool) { s.Data(false, nil, pattern(maxFrameSize)) }}
		p := serveOne(t, h, Config{})
		p.begin(t, h, 1, false)
		release := p.pause()
		p.WriteData(1, false, []byte("x"))
		time.Sleep(stallTimeout - time.Second)
		release()
		p.expect(t, "DATA 1 16384")
		defer p.pause()()
		begun := time.Now()
		p.WriteData(1, false, []byte("x"))
		if err := <-p.served; !errors.Is(err, writebuffer.ErrStalled) {
			t.Errorf("Serve says %v", err)
		}
		if got := time.Since(begun); got != 2*stallTimeout { // it has read the header of the frame
			t.Errorf("it closed after %v", got)
		}
	})
}

// TestPeerThatOpensNoWindow: the connection closes when data waits for the window of the connection
// for a minute. Data that waits for the window of a stream, as of a watch that is not read, may
// wait.
func TestPeerThatOpensNoWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{}, windowOf(1<<20))
		s := p.begin(t, h, 1, false)
		s.Data(false, nil, pattern(defaultWindow+1))
		h.conn.Flush()
		p.expect(t, dataFrames(1, defaultWindow, false)...)
		time.Sleep(stallTimeout - time.Second)
		p.WriteWindowUpdate(0, 1)
		p.expect(t, "DATA 1 1")
		time.Sleep(10 * stallTimeout)
		s.Data(false, nil, pattern(1))
		h.conn.Flush()
		begun := time.Now()
		if err := <-p.served; !errors.Is(err, writebuffer.ErrStalled) || time.Since(begun) != stallTimeout {
			t.Errorf("Serve says %v after %v", err, time.Since(begun))
		}
	})
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{}, windowOf(1))
		p.begin(t, h, 1, false).Data(false, nil, pattern(2))
		h.conn.Flush()
		p.expect(t, "DATA 1 1")
		time.Sleep(10 * stallTimeout)
		p.expect(t)
	})
}

const tooMany = `GOAWAY 1 ENHANCE_YOUR_CALM "too_many_pings"`

// TestPingStrikes are those of grpc-go: the third sends a client away.
func TestPingStrikes(t *testing.T) {
	for name, try := range map[string]struct {
		every   time.Duration
		streams bool
		pings   int // that are answered; 0: any
	}{
		"often":                      {every: time.Second, streams: true, pings: 3},
		"a little too often":         {every: 5*time.Second - 1, streams: true, pings: 3},
		"as often as it may":         {every: 5 * time.Second, streams: true},
		"without streams":            {every: 5 * time.Second, pings: 3},
		"without streams, patiently": {every: 2 * time.Hour},
	} {
		synctest.Test(t, func(t *testing.T) {
			h := &handler{}
			p := serveOne(t, h, Config{MinPingInterval: 5 * time.Second})
			s := p.begin(t, h, 1, true)
			if !try.streams {
				s.Reset(http2.ErrCodeCancel)
				h.conn.Flush()
				p.says(t)
			}
			answered := 0
			for range 20 {
				p.WritePing(false, [8]byte{'x'})
				if synctest.Wait(); answered == try.pings && try.pings > 0 {
					time.Sleep(lingerTimeout)
				}
				got := p.says(t)
				if len(got) == 1 && got[0] == `PING ack "x"` {
					answered++
					time.Sleep(try.every)
					continue
				}
				if want := []string{`PING ack "x"`, tooMany, "closed"}; strings.Join(got, " ") != strings.Join(want, " ") {
					t.Errorf("%s: the peer was sent %q", name, got)
				}
				break
			}
			if want := try.pings; want > 0 && answered != want || want == 0 && answered != 20 {
				t.Errorf("%s: %d pings were answered", name, answered)
			}
		})
	}
}

// TestPingsThatAreExcused: a ping after something was sent is none too many, and forgives those
// before.
func TestPingsThatAreExcused(t *testing.T) {
	for name, send := range map[string]func(s *Stream){
		"headers": func(s *Stream) { s.Headers(okTrailer, false) },
		"data":    func(s *Stream) { s.Data(false, nil, []byte("x")) },
	} {
		synctest.Test(t, func(t *testing.T) {
			h := &handler{}
			p := serveOne(t, h, Config{MinPingInterval: time.Hour})
			s := p.begin(t, h, 1, true)
			for range 10 {
				send(s)
				h.conn.Flush()
				if got := p.says(t); len(got) != 1 {
					t.Fatalf("%s: the peer was sent %q", name, got)
				}
				for range 3 {
					p.WritePing(false, [8]byte{'x'})
					time.Sleep(ackDelay)
					p.expect(t, `PING ack "x"`)
				}
			}
		})
	}
}

// TestPingsOfAServer are answered, all of them.
func TestPingsOfAServer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := dialOne(t, h, Config{MinPingInterval: time.Hour})
		p.says(t)
		for range 10 {
			p.WritePing(false, [8]byte{'x'})
			time.Sleep(ackDelay)
			p.expect(t, `PING ack "x"`)
		}
	})
}

// TestAcknowledgementsThatWait: the acknowledgement of a ping soon after another one leaves with
// the next frames, or after ackDelay. Many pings are acknowledged at once.
func TestAcknowledgementsThatWait(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{})
		s := p.begin(t, h, 1, true)
		time.Sleep(ackDelay)
		ping := func(n int, want ...string) {
			t.Helper()
			for range n {
				p.WritePing(false, [8]byte{'x'})
			}
			p.expect(t, want...)
		}
		const ack = `PING ack "x"`
		ping(1, ack)
		ping(1)
		s.Headers(okTrailer, false)
		h.conn.Flush()
		p.expect(t, ack, "HEADERS 1 grpc-status=0")
		ping(2)
		begun := time.Now()
		time.Sleep(ackDelay - 1)
		p.expect(t)
		time.Sleep(time.Nanosecond)
		p.expect(t, ack, ack)
		if got := time.Since(begun); got != ackDelay {
			t.Errorf("they were acknowledged after %v", got)
		}
		ping(1, ack)
		ping(1)
		s.Headers(okTrailer, true)
		h.conn.Flush()
		p.expect(t, ack, "HEADERS 1 grpc-status=0 end")
		ping(1)
		h.conn.GracefulShutdown() // the last acknowledgement is not lost
		h.conn.Flush()
		p.expect(t, ack, `GOAWAY 2147483647 NO_ERROR "graceful_stop"`, `PING "leaving?"`)
		const many = minWriteSize / (frameHeaderSize + 8)
		for range many {
			p.WritePing(false, [8]byte{'x'})
		}
		if got := p.says(t); len(got) < many/2 {
			t.Errorf("%d pings were acknowledged at once, of %d", len(got), many)
		}
	})
}
