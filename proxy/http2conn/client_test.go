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

// TestGoAway: streams that the server has not seen are refused, the others go on, and the
// connection closes with the last.
func TestGoAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var heard []string
		h := &handler{
			reset:   func(s *Stream, code http2.ErrCode) { heard = append(heard, fmt.Sprint(s.Value(), " ", code)) },
			leaving: func() { heard = append(heard, "leaving") },
		}
		h.headers = func(s *Stream, _ []hpack.HeaderField, end bool) {
			if end {
				s.Finish()
			}
		}
		p := dialOne(t, h, Config{})
		for i := range 3 {
			h.conn.Open(fmt.Sprint("stream ", i), request, i == 0)
		}
		h.conn.Flush()
		p.says(t)
		if !h.conn.CanOpen() || h.conn.Draining() {
			t.Error("the server takes no streams before it says so")
		}
		p.WriteGoAway(1<<31-1, http2.ErrCodeNo, nil) // as servers do that leave in good order
		p.expect(t)
		if h.conn.CanOpen() || !h.conn.Draining() || h.conn.Open("one more", request, true) != nil {
			t.Error("the server still takes streams")
		}
		p.WriteGoAway(3, http2.ErrCodeNo, nil)
		p.expect(t)
		p.headers(1, true, okTrailer)
		p.expect(t)
		p.headers(3, true, okTrailer) // Finish says that the rest of the request is not sent
		p.expect(t, "RST_STREAM 3 NO_ERROR", "closed")
		if want := []string{"leaving", "stream 2 REFUSED_STREAM", "leaving"}; !slices.Equal(heard, want) {
			t.Errorf("the handler heard %q, want %q", heard, want)
		}
		if left := h.conn.Streams(); len(left) > 0 {
			t.Errorf("%d streams are left", len(left))
		}
	})
}

// TestGoAwayAtRest closes at once.
func TestGoAwayAtRest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := dialOne(t, h, Config{})
		p.WriteGoAway(0, http2.ErrCodeNo, nil)
		p.expect(t, "closed")
	})
}

// TestServerHearsGoAway, and goes on with what there is.
func TestServerHearsGoAway(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{})
		s := p.begin(t, h, 1, true)
		p.WriteGoAway(0, http2.ErrCodeNo, nil)
		s.Headers(okTrailer, true)
		h.conn.Flush()
		p.expect(t, "HEADERS 1 grpc-status=0 end")
	})
}

// TestStreamLimit is the peer's, whenever it says so.
func TestStreamLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		limit := func(n uint32) http2.Setting { return http2.Setting{ID: http2.SettingMaxConcurrentStreams, Val: n} }
		h := &handler{}
		p := dialOne(t, h, Config{}, limit(2))
		first := h.conn.Open(nil, request, true)
		if !h.conn.CanOpen() || h.conn.Open(nil, request, true) == nil {
			t.Error("it takes one")
		}
		if h.conn.CanOpen() || h.conn.Open(nil, request, true) != nil || h.conn.Draining() {
			t.Error("it takes three")
		}
		first.Reset(http2.ErrCodeCancel)
		if s := h.conn.Open(nil, request, true); s == nil || s.id != 5 {
			t.Errorf("after one has ended there was opened %v", s)
		}
		p.WriteSettings(limit(1))
		synctest.Wait()
		if h.conn.CanOpen() {
			t.Error("it takes two of one")
		}
	})
}

// TestLastStreamID: identifiers end.
func TestLastStreamID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := dialOne(t, h, Config{})
		h.conn.nextStreamID = 1<<31 - 1
		if h.conn.Open(nil, request, true) == nil || h.conn.Open(nil, request, true) != nil || !h.conn.Draining() {
			t.Error("there is not one stream left")
		}
		h.conn.Flush()
		if got := p.says(t); !strings.HasPrefix(got[len(got)-1], "HEADERS 2147483647 ") {
			t.Errorf("sent %q", got)
		}
	})
}

// TestIdle closes a connection that was long without streams.
func TestIdle(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		h.headers = func(s *Stream, _ []hpack.HeaderField, _ bool) { s.Finish() }
		p := dialOne(t, h, Config{IdleTimeout: time.Minute})
		use := func(id uint32) {
			t.Helper()
			if h.conn.Open(nil, request, true) == nil {
				t.Fatal("it is closed")
			}
			h.conn.Flush()
			time.Sleep(2 * time.Minute) // in use
			p.headers(id, true, okTrailer)
			p.says(t)
		}
		use(1)
		time.Sleep(59 * time.Second)
		use(3)
		time.Sleep(59 * time.Second)
		p.expect(t)
		time.Sleep(time.Second)
		p.expect(t, "closed")
		if h.conn.CanOpen() || !h.conn.Draining() {
			t.Error("it takes streams")
		}
	})
}

// TestIdleFromTheBeginning: nor does one stay that was never used.
func TestIdleFromTheBeginning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := dialOne(t, h, Config{IdleTimeout: time.Minute})
		p.says(t)
		time.Sleep(time.Minute)
		p.expect(t, "closed")
	})
}

// TestIdleWithoutEnd stays.
func TestIdleWithoutEnd(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		h.headers = func(s *Stream, _ []hpack.HeaderField, _ bool) { s.Finish() }
		p := dialOne(t, h, Config{})
		h.conn.Open(nil, request, true)
		h.conn.Flush()
		p.headers(1, true, okTrailer)
		p.says(t)
		time.Sleep(1000 * time.Hour)
		p.expect(t)
	})
}
