package http2conn

import (
	"slices"
	"sync/atomic"
)

// Limits of a server's connection. A client that respects the windows and settings that it is sent
// and does not exceed them gets no error.
const (
	// MaxHeaderListSize is the limit of a header list in bytes, of which each field counts 32
	// (RFC 9113, section 6.5.2). It holds while fields are decoded.
	MaxHeaderListSize = 64 << 10
	// MaxConcurrentStreams is how many streams a client may have open. etcd's default is 2^32-1,
	// which no client can use up: 32,768 open streams cost etcd hundreds of MiB.
	MaxConcurrentStreams = 32 << 10
	// maxHeld is how many bytes the streams of a connection may hold: header lists, and data that
	// the handler has not consumed.
	maxHeld = 64 << 20
	// grantShare is the share of the limits that is used for granted messages. The rest is for the
	// initial windows of streams that wait: data that exceeds it is an error.
	grantShare = 2
	// minHeld is what a connection may hold, in addition to one message, even if the budget of the
	// process is used up.
	minHeld = 256 << 10
	// maxQueued is how many bytes may wait for the windows of a client that starts new streams, if
	// they belong to maxQueuedStreams streams at least: a few long responses are no attack.
	maxQueued        = 64 << 20
	maxQueuedStreams = 64
	// streamOverhead is what a stream costs without its header list.
	streamOverhead = 1 << 10
)

// Budget limits how many bytes the streams of all its connections hold. It is safe for concurrent
// use.
type Budget struct {
	limit int64
	used  atomic.Int64
}

// NewBudget returns a budget of limit bytes.
func NewBudget(limit int64) *Budget { return &Budget{limit: limit} }

// limits counts what the streams of a connection hold.
type limits struct {
	out     *output
	budget  *Budget // or nil
	bytes   int
	granted int       // streams whose message fits by [Stream.Expect]
	exempt  int       // bytes of the one message that always fits
	waiting []*Stream // for a grant
}

// queued counts the data that waits for the peer's windows.
type queued struct {
	bytes   int
	streams int
}

// add counts n bytes, which may be negative. The caller holds mu.
func (h *limits) add(n int) {
	h.bytes += n
	if h.budget != nil {
		h.budget.used.Add(int64(n))
	}
}

// fits reports whether n more bytes are within the limits, divided by share.
func (h *limits) fits(n, share int) bool {
	all := h.bytes + n
	b := h.budget
	return all <= maxHeld/share &&
		(b == nil || all-h.exempt <= minHeld || b.used.Load()+int64(n) <= b.limit/int64(share))
}

// accept returns a new stream of a client with a header list of a size, or nil if it would exceed a
// limit. The caller holds mu.
func (c *Conn) accept(id uint32, headerSize int) *Stream {
	size := streamOverhead + headerSize
	if len(c.streams) >= MaxConcurrentStreams || !c.limits.fits(size, 1) ||
		c.send.queued.bytes > maxQueued && c.send.queued.streams >= maxQueuedStreams {
		return nil
	}
	s := c.cfg.NewStream()
	s.begin(c, id)
	s.overhead = size
	c.limits.add(size)
	return s
}

// receive counts n bytes of data, and reports whether they are within the limits. The caller holds
// conn.mu.
func (s *Stream) receive(n int) bool {
	if !s.conn.server {
		return true
	}
	reserved := min(n, s.reserved)
	s.reserved -= reserved
	s.held += n
	s.conn.limits.add(n - reserved)
	return s.granted || s.conn.limits.fits(0, 1)
}

// Expect opens the flow-control window of a client's stream so that the rest of a message, n bytes,
// can follow. If the connection or the process holds too much, the window opens later. One message
// of each connection always fits.
func (s *Stream) Expect(n int) {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if s.expected = n - s.recvWindow; s.expected <= 0 || c.closed || s.ended.Load() || s.granted {
		return
	}
	s.shared = true
	c.limits.waiting = append(c.limits.waiting, s)
	c.limits.grant()
}

// grant opens the windows of waiting streams, in order, as far as they fit. The caller holds mu.
func (h *limits) grant() {
	for len(h.waiting) > 0 {
		s := h.waiting[0]
		if !s.ended.Load() {
			n := s.recvWindow + s.expected // the window that is there may be used, too
			if h.granted > 0 && !h.fits(n, grantShare) {
				return
			}
			if h.granted == 0 {
				h.exempt, s.exempt = s.held+n, true
			}
			h.granted++
			s.granted, s.reserved = true, n
			h.add(n)
			_ = h.out.framer.WriteWindowUpdate(s.id, uint32(s.expected)) //nolint:gosec // less than a message
			s.recvWindow += s.expected
			s.extra += s.expected
		}
		h.waiting[0] = nil
		h.waiting = h.waiting[1:]
	}
	h.waiting = nil
}

// release gives back what a stream held that has ended. The caller holds conn.mu.
func (s *Stream) release() {
	c := s.conn
	c.limits.add(-s.held - s.reserved - s.overhead)
	s.held, s.reserved, s.overhead = 0, 0, 0
	s.endGrant()
	// else they are few, or most have not ended
	if h := &c.limits; len(h.waiting) > 2*len(c.streams)+16 {
		h.waiting = slices.DeleteFunc(h.waiting, func(s *Stream) bool { return s.ended.Load() })
	}
	c.limits.grant()
}

func (s *Stream) endGrant() {
	if s.granted {
		s.granted = false
		s.conn.limits.granted--
	}
	if s.exempt {
		s.exempt = false
		s.conn.limits.exempt = 0
	}
}

// releaseAll gives everything back. The caller holds mu.
func (h *limits) releaseAll() {
	h.add(-h.bytes)
	h.granted, h.exempt, h.waiting = 0, 0, nil
}
