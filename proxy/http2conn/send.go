package http2conn

import (
	"sync/atomic"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc/mem"
)

// Stream is one stream of a connection. Its methods are safe for concurrent use, and do nothing once it is at its end. What they send is gathered, see [Conn.Flush].
type Stream struct {
	conn  *Conn
	id    uint32
	value atomic.Value

	// Under conn.mu.
	taken     int   // of what the peer has sent, that is not given back
	owed      int   // of what is given back, that the peer was not told of
	window    int64 // what the peer takes
	queue     mem.BufferSlice
	waits     int                 // bytes in queue, from offset on: to count them costs more than to send some
	offset    int                 // into the first of queue
	declared  int64               // what is to come of the content length that the request states, or undeclared
	last      bool                // the end follows the queue
	trailer   []hpack.HeaderField // with these
	isReady   bool                // it stands in conn.ready
	localEnd  bool                // the end was sent
	remoteEnd bool                // the end has come
	ended     bool                // it is in nobody's table
}

func (c *Conn) newStream(id uint32, value any) *Stream {
	s := &Stream{conn: c, id: id, window: c.initial, declared: undeclared}
	if value != nil {
		s.value.Store(value)
	}
	c.streams[id] = s
	return s
}

// Value is what the handler keeps with the stream: nil, until it has said what.
func (s *Stream) Value() any { return s.value.Load() }

// SetValue says what is kept with the stream, always of one type.
func (s *Stream) SetValue(v any) { s.value.Store(v) }

// Open opens a stream. It returns nil if the peer takes none.
func (c *Conn) Open(value any, fields []hpack.HeaderField, end bool) *Stream {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.takes() {
		return nil
	}
	s := c.newStream(c.next, value)
	c.next += 2
	c.headersOut(s, fields, end)
	return s
}

// Headers sends header fields, after what waits. A server's second are the trailer, and have the end.
func (s *Stream) Headers(fields []hpack.HeaderField, end bool) {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed || s.ended || s.localEnd || s.last:
	case len(s.queue) > 0:
		s.trailer, s.last = fields, end
	default:
		c.headersOut(s, fields, end)
	}
}

// headersOut writes a block of headers, in as many frames as it takes.
func (c *Conn) headersOut(s *Stream, fields []hpack.HeaderField, end bool) {
	c.block.Reset()
	for _, f := range fields {
		_ = c.enc.WriteField(f) // a bytes.Buffer takes everything
	}
	block := c.block.Bytes()
	first := block[:min(len(block), c.maxFrame)]
	block = block[len(first):]
	_ = c.write.WriteHeaders(http2.HeadersFrameParam{StreamID: s.id, BlockFragment: first, EndStream: end, EndHeaders: len(block) == 0})
	for len(block) > 0 {
		next := block[:min(len(block), c.maxFrame)]
		block = block[len(next):]
		_ = c.write.WriteContinuation(s.id, len(block) == 0, next)
	}
	c.pings.excused = true
	if end {
		c.sentEnd(s)
	}
}

// sentEnd notes that the end of a stream was sent. A server that has said all it has to say does not want to hear the rest, and a client that has heard all does not go on.
func (c *Conn) sentEnd(s *Stream) {
	s.localEnd = true
	switch {
	case s.remoteEnd:
		s.end()
	case c.server:
		_ = c.write.WriteRSTStream(s.id, http2.ErrCodeNo)
		s.end()
	}
}

// Data sends head and then body, and copies them. It reports whether nothing waits for the peer's windows.
func (s *Stream) Data(end bool, head, body []byte) bool {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || s.ended || s.localEnd || s.last {
		return true
	}
	return s.data(end, head, body)
}

// data is Data for who holds mu.
func (s *Stream) data(end bool, head, body []byte) bool {
	c := s.conn
	for len(s.queue) == 0 {
		all := len(head) + len(body)
		n := min(all, c.room(s))
		if n == 0 && (all > 0 || !end) {
			break
		}
		h := min(n, len(head))
		c.dataHead(s, n, end && n == all)
		c.append(head[:h])
		c.append(body[:n-h])
		c.dataDone(s, n, end && n == all)
		if head, body = head[h:], body[n-h:]; n == all {
			return true
		}
	}
	for _, b := range [][]byte{head, body} {
		if len(b) > 0 {
			s.queue = append(s.queue, mem.Copy(b, c.cfg.Pool))
			s.waits += len(b)
		}
	}
	return s.rest(end)
}

// Buffers is Data for a body that it takes over.
func (s *Stream) Buffers(end bool, head []byte, body mem.BufferSlice) bool {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || s.ended || s.localEnd || s.last {
		body.Free()
		return true
	}
	if body.Len() == 0 { // an end alone does not wait in the queue: there it would have nothing to follow
		body.Free()
		return s.data(end, head, nil)
	}
	if len(head) > 0 {
		s.queue = append(s.queue, mem.Copy(head, c.cfg.Pool))
	}
	s.queue = append(s.queue, body...)
	s.waits += len(head) + body.Len()
	s.last = end
	c.enqueue(s)
	c.pump()
	return s.rest(end)
}

// rest notes what waits.
func (s *Stream) rest(end bool) bool {
	if len(s.queue) == 0 {
		return true
	}
	s.last = s.last || end
	s.conn.enqueue(s)
	return false
}

// room is how many bytes of a stream may go into the next frame.
func (c *Conn) room(s *Stream) int {
	return int(max(0, min(s.window, c.window, int64(c.maxFrame), int64(outLimit-c.gathered()))))
}

// dataHead writes the head of a frame of n bytes, which the caller appends. http2.Framer would copy them once more.
func (c *Conn) dataHead(s *Stream, n int, end bool) {
	flags := byte(0)
	if end {
		flags = byte(http2.FlagDataEndStream)
	}
	c.append([]byte{byte(n >> 16), byte(n >> 8), byte(n), byte(http2.FrameData), flags, byte(s.id >> 24), byte(s.id >> 16), byte(s.id >> 8), byte(s.id)}) //nolint:gosec // the bytes of a number
}

// dataDone notes that a frame was written.
func (c *Conn) dataDone(s *Stream, n int, end bool) {
	s.window -= int64(n)
	c.window -= int64(n)
	c.pings.excused = true
	if end {
		c.sentEnd(s)
	}
}

// enqueue has pump look at a stream, if it has something to send that its own window takes.
func (c *Conn) enqueue(s *Stream) {
	if !s.isReady && !s.ended && len(s.queue) > 0 && s.window > 0 {
		s.isReady = true
		c.ready = append(c.ready, s)
	}
}

// pump moves what waits into the buffer, one frame of each stream in turns.
func (c *Conn) pump() {
	for len(c.ready) > 0 && c.window > 0 && c.gathered() < outLimit && !c.closed {
		s := c.ready[0]
		c.ready = c.ready[1:]
		s.isReady = false
		if s.ended || len(s.queue) == 0 {
			continue
		}
		c.pumpOne(s)
		c.enqueue(s)
	}
	if len(c.ready) == 0 {
		c.ready = nil
	}
}

func (c *Conn) pumpOne(s *Stream) {
	waits := s.waits
	n := min(waits, c.room(s))
	if n == 0 && waits > 0 {
		return
	}
	end := n == waits && s.last && s.trailer == nil
	if n > 0 || end {
		c.dataHead(s, n, end)
		for left := n; left > 0; {
			b := s.queue[0].ReadOnlyData()[s.offset:]
			b = b[:min(left, len(b))]
			c.appendOf(s.queue[0], b)
			left -= len(b)
			if s.offset += len(b); s.offset == s.queue[0].Len() {
				s.queue[0].Free()
				s.queue[0] = nil
				s.queue, s.offset = s.queue[1:], 0
			}
		}
		s.waits -= n
		c.dataDone(s, n, end)
	}
	if n < waits || s.ended {
		return
	}
	s.free()
	if trailer := s.trailer; trailer != nil {
		s.trailer = nil
		c.headersOut(s, trailer, s.last)
	}
	if !s.ended {
		c.drained = append(c.drained, s)
	}
}

// Reset ends a stream at once, and drops what waits.
func (s *Stream) Reset(code http2.ErrCode) {
	c := s.conn
	c.mu.Lock()
	if !c.closed && !s.ended {
		_ = c.write.WriteRSTStream(s.id, code)
		s.end()
	}
	c.mu.Unlock()
	c.closeIfDone()
}

// HasQueued reports whether something waits for the peer's windows.
func (s *Stream) HasQueued() bool {
	s.conn.mu.Lock()
	defer s.conn.mu.Unlock()
	return len(s.queue) > 0
}

// Finish ends a client's stream whose end has come: it has nothing more to say.
func (s *Stream) Finish() {
	c := s.conn
	c.mu.Lock()
	if !c.closed && !s.ended {
		if !s.localEnd {
			_ = c.write.WriteRSTStream(s.id, http2.ErrCodeNo)
		}
		s.end()
	}
	c.mu.Unlock()
	c.closeIfDone()
}

// Consumed returns n received bytes to the flow-control window of the stream.
func (s *Stream) Consumed(n int) {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	s.owed += n
	if s.owed < streamWindow/4 || c.closed || s.ended || s.remoteEnd {
		return
	}
	_ = c.write.WriteWindowUpdate(s.id, uint32(s.owed)) //nolint:gosec // at most a window
	s.taken -= s.owed
	s.owed = 0
}

// end takes a stream out of the table.
func (s *Stream) end() {
	if s.ended {
		return
	}
	s.ended = true
	if s.conn.server && s.remoteEnd {
		s.conn.gone.add(s.id)
	}
	delete(s.conn.streams, s.id)
	s.free()
	s.conn.rest()
}

func (s *Stream) free() {
	s.queue.Free()
	s.queue, s.offset, s.waits = nil, 0, 0
}
