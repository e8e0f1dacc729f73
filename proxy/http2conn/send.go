package http2conn

import (
	"golang.org/x/net/http2"
	"google.golang.org/grpc/mem"
)

// Data sends head and then body, and copies what it cannot send at once. It reports whether nothing
// is queued.
func (s *Stream) Data(end bool, head, body []byte) bool {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || s.ended.Load() || s.localEnd || s.endQueued {
		return true
	}
	return s.data(end, head, body)
}

// data is Data for callers that hold conn.mu.
func (s *Stream) data(end bool, head, body []byte) bool {
	c := s.conn
	for len(s.queue) == 0 {
		all := len(head) + len(body)
		n := min(all, c.sendRoom(s))
		if n == 0 && (all > 0 || !end) {
			break
		}
		h := min(n, len(head))
		c.appendDataHeader(s, n, end && n == all)
		c.append(head[:h])
		c.append(body[:n-h])
		c.dataSent(s, n, end && n == all)
		if head, body = head[h:], body[n-h:]; n == all {
			return true
		}
	}
	for _, b := range [][]byte{head, body} {
		if len(b) > 0 {
			s.queue = append(s.queue, mem.Copy(b, c.cfg.Pool))
			s.countQueued(len(b))
		}
	}
	return s.queueEnd(end)
}

// Buffers is Data for a body that it takes ownership of.
func (s *Stream) Buffers(end bool, head []byte, body mem.BufferSlice) bool {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed || s.ended.Load() || s.localEnd || s.endQueued {
		body.Free()
		return true
	}
	if body.Len() == 0 { // END_STREAM alone is not queued
		body.Free()
		return s.data(end, head, nil)
	}
	if len(head) > 0 {
		s.queue = append(s.queue, mem.Copy(head, c.cfg.Pool))
	}
	s.queue = append(s.queue, body...)
	s.countQueued(len(head) + body.Len())
	s.endQueued = end
	c.enqueue(s)
	c.pump()
	return s.queueEnd(end)
}

// queueEnd has the end follow the queue, if there is one. It reports whether nothing is queued.
func (s *Stream) queueEnd(end bool) bool {
	if len(s.queue) == 0 {
		return true
	}
	s.endQueued = s.endQueued || end
	s.conn.enqueue(s)
	s.conn.watchStall()
	return false
}

// countQueued adds n bytes, which may be negative, to what is queued.
func (s *Stream) countQueued(n int) {
	if n == 0 {
		return
	}
	q, now := &s.conn.queued, int(s.queuedBytes.Add(int64(n)))
	q.bytes += n
	switch {
	case now == n:
		q.streams++
	case now == 0:
		q.streams--
	}
}

// sendRoom is how many bytes of a stream the next DATA frame may have.
func (c *Conn) sendRoom(s *Stream) int {
	return int(max(0, min(s.sendWindow, c.sendWindow, int64(c.peerMaxFrame), int64(flushLimit-c.pendingBytes()))))
}

// appendDataHeader writes the header of a DATA frame of n bytes, which the caller appends.
func (c *Conn) appendDataHeader(s *Stream, n int, end bool) {
	flags := http2.Flags(0)
	if end {
		flags = http2.FlagDataEndStream
	}
	c.appendFrameHeader(n, http2.FrameData, flags, s.id)
}

// dataSent counts a DATA frame of n bytes.
func (c *Conn) dataSent(s *Stream, n int, end bool) {
	s.sendWindow -= int64(n)
	c.sendWindow -= int64(n)
	c.pings.reset = true
	if end {
		c.endSent(s)
	}
}

// enqueue has pump send from a stream, if it has queued data and its window is open.
func (c *Conn) enqueue(s *Stream) {
	if !s.inReady && !s.ended.Load() && len(s.queue) > 0 && s.sendWindow > 0 {
		s.inReady = true
		c.ready = append(c.ready, s)
	}
}

// pump moves queued data to the pending bytes, one frame of each stream in turn.
func (c *Conn) pump() {
	for len(c.ready) > 0 && c.sendWindow > 0 && c.pendingBytes() < flushLimit && !c.closed {
		s := c.ready[0]
		c.ready[0] = nil
		c.ready = c.ready[1:]
		s.inReady = false
		if s.ended.Load() || len(s.queue) == 0 {
			continue
		}
		c.sendQueued(s)
		c.enqueue(s)
	}
	if len(c.ready) == 0 {
		c.ready = nil
	}
	c.watchStall()
}

// sendQueued sends one frame of the queued data of a stream, and the trailer after the last.
func (c *Conn) sendQueued(s *Stream) {
	queued := int(s.queuedBytes.Load())
	n := min(queued, c.sendRoom(s))
	if n == 0 && queued > 0 {
		return
	}
	end := n == queued && s.endQueued && s.trailer == nil
	if n > 0 || end {
		c.appendDataHeader(s, n, end)
		for left := n; left > 0; {
			b := s.queue[0].ReadOnlyData()[s.offset:]
			b = b[:min(left, len(b))]
			c.appendBuffer(s.queue[0], b)
			left -= len(b)
			if s.offset += len(b); s.offset == s.queue[0].Len() {
				s.queue[0].Free()
				s.queue[0] = nil
				s.queue, s.offset = s.queue[1:], 0
			}
		}
		s.countQueued(-n)
		c.dataSent(s, n, end)
	}
	if n < queued || s.ended.Load() {
		return
	}
	s.free()
	if trailer := s.trailer; trailer != nil {
		s.trailer = nil
		c.writeHeaderBlock(s, trailer, s.endQueued)
	}
	if !s.ended.Load() {
		c.writable = append(c.writable, s)
	}
}
