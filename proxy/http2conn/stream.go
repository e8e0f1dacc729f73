package http2conn

import (
	"sync/atomic"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/mem"
)

// Stream is one stream of a connection. Its methods are safe for concurrent use, and do nothing
// after the stream has ended. Frames that they send stay pending until [Conn.Flush].
type Stream struct {
	conn  *Conn
	id    uint32
	value any

	// Written by holders of conn.mu, except for consumed.
	ended       atomic.Bool  // it is not in conn.streams any more
	queuedBytes atomic.Int64 // in queue, from offset on
	consumed    atomic.Int64 // bytes that the next WINDOW_UPDATE frame announces

	// Guarded by conn.mu.
	recvWindow int // how many bytes the peer may send
	held       int // received bytes that were not consumed; of a server
	reserved   int // bytes that were granted and not received
	overhead   int // what the stream itself counts
	expected   int // by how much the window is to be opened for the rest of a message
	extra      int // by how much it was
	sendWindow int64
	queue      mem.BufferSlice // data that waits for a flow-control window
	offset     int             // into the first buffer of queue
	// the rest of the content length that the request states, or undeclared
	declared  int64
	trailer   []hpack.HeaderField // sent after the queue
	granted   bool                // a message of it was granted
	exempt    bool                // it is conn.held.exempt
	endQueued bool                // the end follows the queue
	inReady   bool                // it is in conn.ready
	shared    bool                // it was in a list of the connection's, and may be in copies of it
	localEnd  bool                // the end was sent
	remoteEnd bool                // the end was received
}

// begin makes s a stream of c.
func (s *Stream) begin(c *Conn, id uint32) {
	s.conn, s.id, s.recvWindow, s.sendWindow, s.declared = c, id, c.recvWindow, c.send.initialWindow, undeclared
	c.streams[id] = s
}

// Value returns what SetValue has set, or nil.
func (s *Stream) Value() any { return s.value }

// SetValue attaches a value to a stream that is not open yet. [Handler.Headers] may call it for a
// new stream of a client before anything is sent.
func (s *Stream) SetValue(v any) { s.value = v }

// Open opens a stream of a client. It returns nil if the server accepts none.
func (c *Conn) Open(value any, fields []hpack.HeaderField, end bool) *Stream {
	s := &Stream{value: value}
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.open(s, fields, hpack.HeaderField{}, end) {
		return nil
	}
	return s
}

// OpenOn is Open for memory of the caller's that is no stream, or an unused one. It reports whether
// the server accepts the stream. last is one more field, with a value that differs for each stream,
// if it has a name.
func (c *Conn) OpenOn(s *Stream, fields []hpack.HeaderField, last hpack.HeaderField) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.open(s, fields, last, false)
}

// Request is OpenOn with the whole body of the request, as by [Stream.Data].
func (c *Conn) Request(s *Stream, fields []hpack.HeaderField, last hpack.HeaderField, head, body []byte) (opened, sent bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	opened = c.open(s, fields, last, false)
	return opened, opened && s.data(true, head, body)
}

func (c *Conn) open(s *Stream, fields []hpack.HeaderField, last hpack.HeaderField, end bool) bool {
	if !c.canOpen() {
		return false
	}
	s.begin(c, c.nextStreamID)
	c.nextStreamID += 2
	c.send.headerBlock(s, fields, last, end)
	return true
}

// Headers sends header fields, which must not change any more, after the queued data. The second
// ones of a server are the trailer, and have the end.
func (s *Stream) Headers(fields []hpack.HeaderField, end bool) {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed || s.ended.Load() || s.localEnd || s.endQueued:
	case len(s.queue) > 0:
		s.trailer, s.endQueued = fields, end
	default:
		c.send.headerBlock(s, fields, hpack.HeaderField{}, end)
	}
}

// headerBlock writes header fields, and last if it has a name, in as many frames as necessary.
func (d *sender) headerBlock(s *Stream, fields []hpack.HeaderField, last hpack.HeaderField, end bool) {
	block := d.out.encoder.encode(fields, last)
	kind, flags := http2.FrameHeaders, http2.Flags(0)
	if end {
		flags = http2.FlagHeadersEndStream
	}
	for first := true; first || len(block) > 0; first = false {
		next := block[:min(len(block), d.maxFrame)]
		if block = block[len(next):]; len(block) == 0 {
			flags |= http2.FlagHeadersEndHeaders // the same as that of CONTINUATION frames
		}
		d.out.frameHeader(len(next), kind, flags, s.id)
		d.out.append(next)
		kind, flags = http2.FrameContinuation, 0
	}
	d.active = true
	if end {
		d.endSent(s)
	}
}

// endSent notes that END_STREAM was sent. A server that has responded ignores the rest of the
// request, and a client that has the whole response sends nothing more.
func (d *sender) endSent(s *Stream) {
	s.localEnd = true
	switch {
	case s.remoteEnd:
		s.end()
	case d.conn.server:
		_ = d.out.framer.WriteRSTStream(s.id, http2.ErrCodeNo)
		s.end()
	}
}

// Reset ends a stream at once, and drops its queued data.
func (s *Stream) Reset(code http2.ErrCode) {
	c := s.conn
	c.mu.Lock()
	if !c.closed && !s.ended.Load() {
		_ = c.out.framer.WriteRSTStream(s.id, code)
		s.end()
	}
	c.mu.Unlock()
	c.closeIfDone()
}

// Finish ends a client's stream after the server has ended it: its request is not needed any more.
func (s *Stream) Finish() {
	c := s.conn
	if !s.ended.Load() {
		c.mu.Lock()
		if !c.closed && !s.ended.Load() {
			if !s.localEnd {
				_ = c.out.framer.WriteRSTStream(s.id, http2.ErrCodeNo)
			}
			s.end()
		}
		c.mu.Unlock()
	}
	c.closeIfDone()
}

// Unused reports whether the stream has ended and the connection has no reference to it, except for
// what handles a frame of the peer: then its memory may be used for another stream.
func (s *Stream) Unused() bool { return s.ended.Load() && !s.shared }

// HasQueued reports whether data waits for a flow-control window.
func (s *Stream) HasQueued() bool { return s.queuedBytes.Load() > 0 }

// end removes the stream from the connection. The caller holds conn.mu.
func (s *Stream) end() {
	if s.ended.Load() {
		return
	}
	s.ended.Store(true)
	c := s.conn
	if c.server && s.remoteEnd {
		c.recentlyEnded.add(s.id)
	}
	delete(c.streams, s.id)
	s.free()
	s.release()
	c.keepalive.startIdleTimer()
}

// free drops the queued data.
func (s *Stream) free() {
	s.countQueued(-int(s.queuedBytes.Load()))
	s.queue.Free()
	s.queue, s.offset = nil, 0
}
