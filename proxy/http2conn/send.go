package http2conn

import (
	"time"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
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
		n := min(all, c.send.room(s))
		if n == 0 && (all > 0 || !end) {
			break
		}
		h := min(n, len(head))
		c.out.dataHeader(s, n, end && n == all)
		c.out.append(head[:h])
		c.out.append(body[:n-h])
		c.send.sent(s, n, end && n == all)
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
	c.send.enqueue(s)
	c.send.sendReady()
	return s.queueEnd(end)
}

// queueEnd has the end follow the queue, if there is one. It reports whether nothing is queued.
func (s *Stream) queueEnd(end bool) bool {
	if len(s.queue) == 0 {
		return true
	}
	s.endQueued = s.endQueued || end
	s.conn.send.enqueue(s)
	s.conn.send.watchStall()
	return false
}

// countQueued adds n bytes, which may be negative, to what is queued.
func (s *Stream) countQueued(n int) {
	if n == 0 {
		return
	}
	s.shared = true
	q, now := &s.conn.send.queued, int(s.queuedBytes.Add(int64(n)))
	q.bytes += n
	switch now {
	case n:
		q.streams++
	case 0:
		q.streams--
	}
}

// sender is the flow control of what is sent: it knows the windows of the peer, and which streams
// have data that waits for them. The mu of the connection guards it.
type sender struct {
	conn          *Conn
	out           *output
	window        int64 // of the connection
	initialWindow int64 // of a new stream
	maxFrame      int
	ready         []*Stream   // with queued data and an open flow-control window
	writable      []*Stream   // that Writable is to be called for
	queued        queued      // data of all streams
	stallTimer    *time.Timer // until the peer must open the connection's window
	active        bool        // headers or data were sent since the last ping
}

// room is how many bytes of a stream the next DATA frame may have.
func (d *sender) room(s *Stream) int {
	return int(max(0, min(s.sendWindow, d.window, int64(d.maxFrame), int64(flushLimit-d.out.size()))))
}

// dataHeader writes the header of a DATA frame of n bytes, which the caller appends.
func (o *output) dataHeader(s *Stream, n int, end bool) {
	flags := http2.Flags(0)
	if end {
		flags = http2.FlagDataEndStream
	}
	o.frameHeader(n, http2.FrameData, flags, s.id)
}

// sent counts a DATA frame of n bytes.
func (d *sender) sent(s *Stream, n int, end bool) {
	s.sendWindow -= int64(n)
	d.window -= int64(n)
	d.active = true
	if end {
		d.endSent(s)
	}
}

// enqueue has sendReady send from a stream, if it has queued data and its window is open.
func (d *sender) enqueue(s *Stream) {
	if !s.inReady && !s.ended.Load() && len(s.queue) > 0 && s.sendWindow > 0 {
		s.inReady = true
		d.ready = append(d.ready, s)
	}
}

// sendReady moves queued data to the pending bytes, one frame of each stream in turn.
func (d *sender) sendReady() {
	for len(d.ready) > 0 && d.window > 0 && d.out.size() < flushLimit && !d.conn.closed {
		s := d.ready[0]
		d.ready[0] = nil
		d.ready = d.ready[1:]
		s.inReady = false
		if s.ended.Load() || len(s.queue) == 0 {
			continue
		}
		d.sendQueued(s)
		d.enqueue(s)
	}
	if len(d.ready) == 0 {
		d.ready = nil
	}
	d.watchStall()
}

// sendQueued sends one frame of the queued data of a stream, and the trailer after the last.
func (d *sender) sendQueued(s *Stream) {
	queued := int(s.queuedBytes.Load())
	n := min(queued, d.room(s))
	if n == 0 && queued > 0 {
		return
	}
	end := n == queued && s.endQueued && s.trailer == nil
	if n > 0 || end {
		d.out.dataHeader(s, n, end)
		for left := n; left > 0; {
			b := s.queue[0].ReadOnlyData()[s.offset:]
			b = b[:min(left, len(b))]
			d.out.appendBuffer(s.queue[0], b)
			left -= len(b)
			if s.offset += len(b); s.offset == s.queue[0].Len() {
				s.queue[0].Free()
				s.queue[0] = nil
				s.queue, s.offset = s.queue[1:], 0
			}
		}
		s.countQueued(-n)
		d.sent(s, n, end)
	}
	if n < queued || s.ended.Load() {
		return
	}
	s.free()
	if trailer := s.trailer; trailer != nil {
		s.trailer = nil
		d.headerBlock(s, trailer, hpack.HeaderField{}, s.endQueued)
	}
	if !s.ended.Load() {
		d.writable = append(d.writable, s)
	}
}
