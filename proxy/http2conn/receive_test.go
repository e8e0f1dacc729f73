package http2conn

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// send sends n bytes on a stream, in frames of the largest size, and waits until the Conn has
// counted them: the pipe is empty when they are read, which is earlier.
func (p *peer) send(id uint32, n int) {
	for ; n > 0; n -= maxFrameSize {
		p.WriteData(id, false, make([]byte, min(n, maxFrameSize)))
	}
	synctest.Wait()
}

// TestCredit is given for what the handler has given back, when it is worth a frame, and for
// nothing else.
func TestCredit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{})
		s := p.begin(t, h, 1, false)
		p.send(1, defaultWindow)
		p.expect(t)
		s.Consumed(defaultWindow/4 - 1)
		h.conn.Flush()
		p.expect(t)
		s.Consumed(1)
		h.conn.Flush()
		p.expect(t, fmt.Sprint("WINDOW_UPDATE 1 ", defaultWindow/4))
		p.send(1, defaultWindow/4)
		p.expect(t)
		p.WriteData(1, false, []byte("x"))
		p.expect(t, "RST_STREAM 1 FLOW_CONTROL_ERROR")
		s.Consumed(defaultWindow)
		h.conn.Flush()
		p.expect(t)
	})
}

// TestNoCreditAfterTheEnd: the peer has nothing more to send.
func TestNoCreditAfterTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{})
		s := p.begin(t, h, 1, false)
		p.send(1, defaultWindow-1)
		p.WriteData(1, true, []byte("x"))
		p.expect(t)
		s.Consumed(defaultWindow)
		h.conn.Flush()
		p.expect(t)
	})
}

// TestPaddingIsGivenBack: nobody sees it, and it counts.
func TestPaddingIsGivenBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		brought := 0
		h := &handler{data: func(_ *Stream, data []byte, _ bool) { brought += len(data) }}
		p := serveOne(t, h, Config{})
		s := p.begin(t, h, 1, false)
		pad := make([]byte, 255)
		for range (defaultWindow + 1) / 256 {
			p.WriteDataPadded(1, false, nil, pad)
		}
		p.expect(t, slices.Repeat([]string{"WINDOW_UPDATE 1 16384"}, 4)...)
		p.send(1, defaultWindow)
		p.expect(t)
		s.Consumed(defaultWindow)
		h.conn.Flush()
		p.expect(t, fmt.Sprint("WINDOW_UPDATE 1 ", defaultWindow))
		if brought != defaultWindow {
			t.Errorf("%d bytes were brought", brought)
		}
	})
}

// TestConnectionWindow is refilled whether or not streams are given credit, and whatever became of
// them.
func TestConnectionWindow(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{})
		p.begin(t, h, 1, false)
		p.begin(t, h, 3, false).Reset(http2.ErrCodeCancel)
		p.begin(t, h, 101, false).Reset(http2.ErrCodeCancel)
		h.conn.Flush()
		p.expect(t, "RST_STREAM 3 CANCEL", "RST_STREAM 101 CANCEL")
		p.send(1, defaultWindow)
		p.send(3, connWindow/2-defaultWindow-1)
		p.WriteDataPadded(101, false, nil, nil)
		p.expect(t)
		p.WriteData(3, false, []byte("x"))
		p.expect(t, fmt.Sprint("WINDOW_UPDATE ", connWindow/2))
		p.send(3, connWindow/2-1)
		p.expect(t)
		p.WriteData(5, false, []byte("x")) // which was passed over
		p.expect(t, fmt.Sprint("WINDOW_UPDATE ", connWindow/2))
	})
}

// TestDataAfterTheEnd resets the stream, of which the handler hears.
func TestDataAfterTheEnd(t *testing.T) {
	for _, server := range []bool{true, false} {
		synctest.Test(t, func(t *testing.T) {
			var codes []http2.ErrCode
			h := &handler{reset: func(_ *Stream, code http2.ErrCode) { codes = append(codes, code) }}
			var p *peer
			if server {
				p = serveOne(t, h, Config{})
				p.begin(t, h, 1, true)
			} else {
				p = dialOne(t, h, Config{})
				h.conn.Open(nil, request, false)
				h.conn.Flush()
				p.says(t)
				p.headers(1, true, okTrailer)
			}
			p.WriteData(1, false, []byte("x"))
			p.expect(t, "RST_STREAM 1 STREAM_CLOSED")
			if !slices.Equal(codes, []http2.ErrCode{http2.ErrCodeStreamClosed}) {
				t.Errorf("the handler heard %v", codes)
			}
			p.WriteData(1, false, []byte("x"))
			p.expect(t)
		})
	}
}

// TestHeadersAfterTheEnd of a server's, and of a stream that its client has left.
func TestHeadersAfterTheEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var got []string
		h := &handler{
			headers: func(s *Stream, _ []hpack.HeaderField, end bool) { got = append(got, fmt.Sprint("headers ", s.id, end)) },
			reset:   func(s *Stream, code http2.ErrCode) { got = append(got, fmt.Sprint("reset ", s.id, code)) },
		}
		p := dialOne(t, h, Config{})
		h.conn.Open(nil, request, false)
		h.conn.Open(nil, request, true).Reset(http2.ErrCodeCancel)
		h.conn.Flush()
		p.says(t)
		p.headers(1, false, okTrailer)
		p.headers(1, true, okTrailer)
		p.headers(3, true, okTrailer)
		p.expect(t)
		p.headers(1, true, okTrailer)
		p.expect(t, "RST_STREAM 1 STREAM_CLOSED")
		if want := "headers 1 false, headers 1 true, reset 1 STREAM_CLOSED"; strings.Join(got, ", ") != want {
			t.Errorf("the handler heard %q, want %q", got, want)
		}
	})
}

// TestStreamIDs: a client that goes back, or opens streams of a server's, is told so and left.
func TestStreamIDs(t *testing.T) {
	for _, id := range []uint32{1, 2, 3, 4} {
		synctest.Test(t, func(t *testing.T) {
			h := &handler{}
			p := serveOne(t, h, Config{})
			p.begin(t, h, 3, true).Reset(http2.ErrCodeCancel)
			h.conn.Flush()
			p.expect(t, "RST_STREAM 3 CANCEL")
			p.headers(id, true, request)
			time.Sleep(lingerTimeout)
			got := p.says(t)
			if len(got) != 2 || !strings.HasPrefix(got[0], fmt.Sprintf("GOAWAY 3 PROTOCOL_ERROR \"received an illegal stream id: %d.", id)) || got[1] != "closed" {
				t.Errorf("stream %d: %q", id, got)
			}
			if err := <-p.served; err == nil || !strings.Contains(err.Error(), "illegal stream id") {
				t.Errorf("Serve says %v", err)
			}
		})
	}
}
