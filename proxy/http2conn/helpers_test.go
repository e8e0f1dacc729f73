package http2conn

import (
	"bytes"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/mem"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds every wait for something that must happen.
const patience = time.Minute

func wait[T any](t testing.TB, c <-chan T, what string) (got T) {
	t.Helper()
	select {
	case got = <-c:
	case <-time.After(patience):
		t.Fatalf("no %s", what)
	}
	return got
}

// ledger is a pool that keeps account: of what is lent, and of what comes back that was not. It
// spoils what comes back, so that a test finds a later use.
type ledger struct {
	mu     sync.Mutex
	lent   map[*[]byte]bool
	gets   []int // sizes
	strays int   // were given back, and not lent
}

var _ mem.BufferPool = (*ledger)(nil)

// Get implements mem.BufferPool.
func (l *ledger) Get(n int) *[]byte {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.lent == nil {
		l.lent = make(map[*[]byte]bool)
	}
	b := make([]byte, n, max(n, 2<<10)) // as the pool of package proxy
	l.lent[&b] = true
	l.gets = append(l.gets, n)
	return &b
}

// Put implements mem.BufferPool.
func (l *ledger) Put(b *[]byte) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.lent[b] {
		l.strays++
	}
	delete(l.lent, b)
	for i := range *b {
		(*b)[i] = 0xdb
	}
}

func (l *ledger) out() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return len(l.lent)
}

// check is for the end, when everything must be back.
func (l *ledger) check(t testing.TB) {
	t.Helper()
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.lent) > 0 || l.strays > 0 {
		t.Errorf("%d buffers were not given back, and %d were that were not lent", len(l.lent), l.strays)
	}
}

// body is n bytes of the pool, in buffers of at most each. Nothing smaller than what grpc/mem gives
// back may be among them, if they are to be counted.
func (l *ledger) body(n, each int) (body mem.BufferSlice) {
	all := pattern(n)
	for len(all) > 0 {
		part := all[:min(each, len(all))]
		b := l.Get(len(part))
		copy(*b, part)
		body = append(body, bufferOf(b, l)...)
		all = all[len(part):]
	}
	return body
}

func bufferOf(b *[]byte, l *ledger) mem.BufferSlice { return mem.BufferSlice{mem.NewBuffer(b, l)} }

// endless is what all bodies are cut from: of its neighbours of 251 no two are alike.
var endless = func() []byte {
	b := make([]byte, 8<<20)
	for i := range b {
		b[i] = byte(i % 251)
	}
	return b
}()

// pattern is the first n bytes of it.
func pattern(n int) []byte { return endless[:n:n] }

// handler is a Handler of functions that the test writes. What is nil does nothing.
type handler struct {
	conn    *Conn
	vectors bool // the connection takes several buffers in one write
	headers func(s *Stream, fields []hpack.HeaderField, end bool)
	data    func(s *Stream, data []byte, end bool)
	reset   func(s *Stream, code http2.ErrCode)
	sent    func(s *Stream)
	greeted func()
	leaving func()
	idle    func() // before the flush
}

var _ Handler = (*handler)(nil)

func (h *handler) Headers(s *Stream, fields []hpack.HeaderField, end bool) {
	if h.headers != nil {
		h.headers(s, fields, end)
	}
}

func (h *handler) Data(s *Stream, data []byte, end bool) {
	if h.data != nil {
		h.data(s, data, end)
	}
}

func (h *handler) Reset(s *Stream, code http2.ErrCode) {
	if h.reset != nil {
		h.reset(s, code)
	}
}

func (h *handler) Writable(s *Stream) {
	if h.sent != nil {
		h.sent(s)
	}
}

func (h *handler) SettingsReceived() {
	if h.greeted != nil {
		h.greeted()
	}
}

func (h *handler) GoAwayReceived() {
	if h.leaving != nil {
		h.leaving()
	}
}

func (h *handler) FlushNeeded() {
	if h.idle != nil {
		h.idle()
	}
	for h.conn.NeedsFlush() { // Writable has sent WINDOW_UPDATE frames
		h.conn.Flush()
	}
}

// echo answers each stream with what it brings, and with a trailer. It gives credit as the engine
// does: for what the client has taken.
func echo() *handler {
	h := &handler{sent: func(s *Stream) { s.Value().(*echoing).credit(s) }}
	h.headers = func(s *Stream, _ []hpack.HeaderField, end bool) {
		s.SetValue(&echoing{})
		s.Headers(fields(":status", "200", "content-type", "application/grpc"), false)
		if end {
			s.Headers(okTrailer, true)
		}
	}
	h.data = func(s *Stream, data []byte, end bool) {
		e := s.Value().(*echoing)
		e.add(len(data))
		if s.Data(false, nil, data) && !s.HasQueued() {
			e.credit(s)
		}
		if end {
			s.Headers(okTrailer, true)
		}
	}
	return h
}

var okTrailer = fields("grpc-status", "0")

// echoing is what of a stream was not given back.
type echoing struct {
	mu   sync.Mutex
	held int
}

func (e *echoing) add(n int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.held += n
}

func (e *echoing) credit(s *Stream) {
	e.mu.Lock()
	n := e.held
	e.held = 0
	e.mu.Unlock()
	s.Consumed(n)
}

// fields makes header fields of names and values.
func fields(all ...string) (made []hpack.HeaderField) {
	for i := 0; i < len(all); i += 2 {
		made = append(made, hpack.HeaderField{Name: all[i], Value: all[i+1]})
	}
	return made
}

// request are the header fields of a call.
var request = fields(":method", "POST", ":scheme", "http", ":path", "/s/m", ":authority", "a", "content-type", "application/grpc", "te", "trailers")

// same fails unless got is want.
func same(t testing.TB, what string, got, want []byte) {
	t.Helper()
	if !bytes.Equal(got, want) {
		t.Errorf("%s: %d bytes that differ, want %d", what, len(got), len(want))
	}
}
