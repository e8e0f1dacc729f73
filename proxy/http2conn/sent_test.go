package http2conn

import (
	"slices"
	"testing"
	"testing/synctest"
)

// told notes for which streams Writable was called, and fails where something of them waits.
func told(t *testing.T, h *handler) (take func() []uint32) {
	t.Helper()
	calls := make(chan uint32, 100)
	h.sent = func(s *Stream) {
		if s.HasQueued() {
			t.Errorf("Writable of stream %d, of which something waits", s.id)
		}
		calls <- s.id
	}
	return func() (all []uint32) {
		synctest.Wait()
		for len(calls) > 0 {
			all = append(all, <-calls)
		}
		return all
	}
}

// TestSent is called once for each time that something has waited and then nothing, and when that
// was written.
func TestSent(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		sent := told(t, h)
		p := serveOne(t, h, Config{}, windowOf(10))
		s, other := p.begin(t, h, 1, true), p.begin(t, h, 3, true)
		expect := func(when string, want ...uint32) {
			t.Helper()
			if got := sent(); !slices.Equal(got, want) {
				t.Fatalf("%s: Writable was called for %v, want %v", when, got, want)
			}
		}
		if !s.Data(false, nil, pattern(10)) {
			t.Error("what the window takes waits")
		}
		h.conn.Flush()
		expect("nothing has waited")
		if s.Data(false, nil, pattern(10)) {
			t.Error("what the window does not take does not wait")
		}
		s.Data(false, nil, pattern(10))
		other.Data(false, nil, pattern(11))
		h.conn.Flush()
		expect("all waits")
		p.WriteWindowUpdate(1, 19)
		expect("a byte waits")
		p.WriteWindowUpdate(1, 1)
		expect("nothing waits", 1)
		p.WriteWindowUpdate(1, 100)
		expect("nothing has waited since")
		p.WriteWindowUpdate(3, 100)
		expect("the other waits no more", 3)
		if !s.Data(false, nil, pattern(100)) {
			t.Error("the window takes it")
		}
		s.Data(true, nil, pattern(1))
		p.WriteWindowUpdate(1, 1)
		expect("it has ended") // nobody wants to know
	})
}

// TestSentOfAClient: its stream goes on when its last word is sent.
func TestSentOfAClient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		sent := told(t, h)
		p := dialOne(t, h, Config{}, windowOf(10))
		s := h.conn.Open(nil, request, false)
		s.Data(true, nil, pattern(20))
		h.conn.Flush()
		p.WriteWindowUpdate(1, 10)
		if got := sent(); !slices.Equal(got, []uint32{1}) {
			t.Errorf("Writable was called for %v", got)
		}
		if got := p.says(t); got[len(got)-1] != "DATA 1 10 end" {
			t.Errorf("sent %q", got)
		}
	})
}

// TestSentOnlyWhenNothingWaits: what has waited is on its way, but before anybody was told, more
// came that waits again.
func TestSentOnlyWhenNothingWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		sent := told(t, h)
		p := serveOne(t, h, Config{}, windowOf(10))
		s := p.begin(t, h, 1, true)
		s.Buffers(false, nil, p.pool.body(10, 10))
		if s.Data(false, nil, pattern(1)) {
			t.Fatal("it has room")
		}
		h.conn.Flush()
		if got := sent(); len(got) > 0 {
			t.Errorf("Writable was called for %v", got)
		}
		p.WriteWindowUpdate(1, 1)
		if got := sent(); !slices.Equal(got, []uint32{1}) {
			t.Errorf("Writable was called for %v", got)
		}
	})
}

// TestSentOfMuch: what one write does not take waits as well, and goes with the same flush.
func TestSentOfMuch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		sent := told(t, h)
		p := serveOne(t, h, Config{}, windowOf(1<<24))
		p.WriteWindowUpdate(0, 1<<24)
		s := p.begin(t, h, 1, true)
		const n = 5*flushLimit + 1
		if s.Data(false, nil, pattern(n)) || !s.HasQueued() {
			t.Error("more is gathered than the limit")
		}
		s.Headers(okTrailer, true)
		if got := len(*h.conn.out.pending); got > flushLimit+maxFrameSize {
			t.Errorf("%d bytes were gathered", got)
		}
		h.conn.Flush()
		if got := sent(); len(got) > 0 {
			t.Errorf("Writable was called for %v, which has ended", got)
		}
		same(t, "stream", p.took(1), pattern(n))
		if got := p.says(t); got[len(got)-1] != "HEADERS 1 grpc-status=0 end" {
			t.Errorf("the last was %q", got[len(got)-1])
		}
	})
}

// TestSentAfterABlockedWrite: nothing is on its way before the connection has taken it.
func TestSentAfterABlockedWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		h := &handler{}
		sent := told(t, h)
		p := serveOne(t, h, Config{}, windowOf(10))
		s := p.begin(t, h, 1, true)
		s.Data(false, nil, pattern(20))
		h.conn.Flush()
		release := p.pause()
		p.says(t)
		p.WriteWindowUpdate(1, 10)
		if got := sent(); len(got) > 0 {
			t.Errorf("Writable was called for %v", got)
		}
		release()
		if got := sent(); !slices.Equal(got, []uint32{1}) {
			t.Errorf("Writable was called for %v", got)
		}
	})
}
