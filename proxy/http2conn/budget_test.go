package http2conn

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// TestExpect opens the window of a stream for a message that the initial window does not fit.
func TestExpect(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		budget := NewBudget(1 << 30)
		p := serveOne(t, h, Config{Budget: budget})
		s := p.begin(t, h, 1, false)
		before := budget.used.Load()
		s.Expect(defaultWindow) // it fits
		h.conn.Flush()
		p.expect(t)
		p.send(1, 1000)
		s.Expect(100_000)
		h.conn.Flush()
		p.expect(t, fmt.Sprint("WINDOW_UPDATE 1 ", 100_000-(defaultWindow-1000)))
		if got := budget.used.Load() - before; got != 101_000 {
			t.Errorf("the message counts %d bytes", got)
		}
		p.send(1, 100_000)
		p.expect(t)
		if got := budget.used.Load() - before; got != 101_000 {
			t.Errorf("the message counts %d bytes after it was received", got)
		}
		p.WriteData(1, false, []byte("x"))
		p.expect(t, "RST_STREAM 1 FLOW_CONTROL_ERROR")
		if got := budget.used.Load(); got != 0 {
			t.Errorf("%d bytes are held without streams", got)
		}
	})
}

// TestMessagesWaitForTheLimit: of many unfinished messages only those that fit are granted, and
// each that is consumed, or whose stream ends, makes way for the next. None is an error.
func TestMessagesWaitForTheLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n, size = 100, 1_900_000
		h := &handler{}
		budget := NewBudget(1 << 30)
		p := serveOne(t, h, Config{Budget: budget})
		all := make([]*Stream, n)
		for i := range all {
			all[i] = p.begin(t, h, uint32(2*i+1), false)
			p.send(uint32(2*i+1), 1000)
			all[i].Expect(size - 1000)
		}
		h.conn.Flush()
		granted := len(p.says(t))
		if granted < 15 || granted > maxHeld/grantShare/size {
			t.Fatalf("%d messages of %d bytes were granted", granted, size)
		}
		for i := range n {
			window := defaultWindow - 1000
			if i < granted {
				window = size - 1000
			}
			p.send(uint32(2*i+1), window)
			if got := slices.DeleteFunc(p.says(t), isConnWindow); len(got) > 0 {
				t.Fatalf("stream %d: %q", 2*i+1, got)
			}
		}
		if got := budget.used.Load(); got > maxHeld+connWindow {
			t.Errorf("%d bytes are held", got)
		}
		all[0].Reset(http2.ErrCodeCancel)
		all[1].Consumed(size)
		h.conn.Flush()
		if got := slices.DeleteFunc(p.says(t), isConnWindow); len(got) < 2 {
			t.Errorf("two messages are gone, and the peer was sent %q", got)
		}
		for _, s := range all {
			s.Reset(http2.ErrCodeCancel)
		}
		if got := budget.used.Load(); got != 0 || h.conn.limits.granted != 0 || len(h.conn.limits.waiting) != 0 {
			t.Errorf("after all: %d bytes, %+v", got, h.conn.limits)
		}
	})
}

func isConnWindow(s string) bool {
	return strings.HasPrefix(s, "WINDOW_UPDATE ") && strings.Count(s, " ") == 1
}

// TestBudgetOfTheProcess: when others have used it up, a connection still gets one message at a
// time, and small requests.
func TestBudgetOfTheProcess(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 1_900_000
		h := &handler{}
		budget := NewBudget(4 << 20)
		budget.used.Store(4 << 20)
		p := serveOne(t, h, Config{Budget: budget})
		first, second := p.begin(t, h, 1, false), p.begin(t, h, 3, false)
		first.Expect(size)
		second.Expect(size)
		h.conn.Flush()
		p.expect(t, fmt.Sprint("WINDOW_UPDATE 1 ", size-defaultWindow))
		p.send(1, size)
		first.Consumed(size)
		h.conn.Flush()
		if got := p.says(t); !slices.Contains(got, fmt.Sprint("WINDOW_UPDATE 3 ", size-defaultWindow)) {
			t.Errorf("the peer was sent %q", got)
		}
		p.send(3, size)
		p.says(t)
		p.begin(t, h, 5, false) // the first streams of a connection
		p.expect(t)
		if p.headers(7, false, request); len(p.says(t)) > 0 {
			t.Error("a stream was refused")
		}
		h.conn.Close()
		if got := budget.used.Load(); got != 4<<20 {
			t.Errorf("%d bytes are held", got)
		}
	})
}

// TestTooMuchData: data that no message was granted for is an error of its stream when the
// connection holds too much already, and the streams that were before stay.
func TestTooMuchData(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var codes []http2.ErrCode
		h := &handler{reset: func(_ *Stream, code http2.ErrCode) { codes = append(codes, code) }}
		p := serveOne(t, h, Config{})
		id := uint32(1)
		for ; len(codes) == 0; id += 2 {
			if id > 2*maxHeld/defaultWindow+1 {
				t.Fatalf("%d streams hold a window each", id/2)
			}
			p.headers(id, false, request)
			p.send(id, defaultWindow)
			synctest.Wait()
		}
		if !slices.Equal(codes, []http2.ErrCode{http2.ErrCodeEnhanceYourCalm}) {
			t.Errorf("codes %v", codes)
		}
		if got := len(h.conn.Streams()); got != int(id/2)-1 {
			t.Errorf("%d streams, want %d", got, id/2-1)
		}
		p.says(t)
	})
}

// TestTooManyStreams are refused, so that the client may try them again.
func TestTooManyStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		p := serveOne(t, h, Config{})
		id := uint32(1)
		for range MaxConcurrentStreams {
			p.headers(id, false, request)
			id += 2
		}
		p.expect(t)
		p.headers(id, false, request)
		p.expect(t, fmt.Sprint("RST_STREAM ", id, " REFUSED_STREAM"))
		p.WriteRSTStream(1, http2.ErrCodeCancel)
		p.headers(id+2, false, request)
		p.expect(t)
		if got := len(h.conn.Streams()); got != MaxConcurrentStreams {
			t.Errorf("%d streams", got)
		}
	})
}

// TestResponsesThatAreNotRead: a client that starts calls without end and never opens a window is
// refused new ones when long responses wait on many streams.
func TestResponsesThatAreNotRead(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{vectors: true, headers: func(s *Stream, _ []hpack.HeaderField, _ bool) {
			s.Headers(fields(":status", "200"), false)
			s.Data(false, nil, pattern(1<<20))
			s.Headers(okTrailer, true)
		}}
		p := serveOne(t, h, Config{}, windowOf(0))
		id := uint32(1)
		for ; id < 1000; id += 2 {
			p.headers(id, true, request)
			if slices.Contains(p.says(t), fmt.Sprint("RST_STREAM ", id, " REFUSED_STREAM")) {
				break
			}
		}
		if got := int(id / 2); got < maxQueuedStreams || got > maxQueued>>20+1 {
			t.Errorf("after %d responses of 1 MiB a stream was refused", got)
		}
		p.WriteSettings(windowOf(1 << 20)) // it reads again
		p.WriteWindowUpdate(0, 1<<30)
		p.says(t)
		p.headers(id+2, true, request)
		if got := p.says(t); slices.Contains(got, fmt.Sprint("RST_STREAM ", id+2, " REFUSED_STREAM")) {
			t.Error("it reads, and is refused")
		}
	})
}
