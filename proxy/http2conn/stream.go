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
	conn      *Conn
	id        uint32
	userValue atomic.Value

	// Guarded by conn.mu.
	recvWindow  int // how many bytes the peer may send
	consumed    int // bytes that the next WINDOW_UPDATE frame announces
	held        int // received bytes that were not consumed; of a server
	reserved    int // bytes that were granted and not received
	overhead    int // what the stream itself counts
	expected    int // by how much the window is to be opened for the rest of a message
	extra       int // by how much it was
	sendWindow  int64
	queue       mem.BufferSlice // data that waits for a flow-control window
	queuedBytes int             // in queue, from offset on
	offset      int             // into the first buffer of queue
	// the rest of the content length that the request states, or undeclared
	declared  int64
	trailer   []hpack.HeaderField // sent after the queue
	granted   bool                // a message of it was granted
	exempt    bool                // it is conn.held.exempt
	endQueued bool                // the end follows the queue
	inReady   bool                // it is in conn.ready
	localEnd  bool                // the end was sent
	remoteEnd bool                // the end was received
	ended     bool                // it is not in conn.streams any more
}

func (c *Conn) newStream(id uint32, value any) *Stream {
	s := new(Stream)
	s.conn, s.id, s.recvWindow, s.sendWindow, s.declared = c, id, c.recvWindow(), c.peerInitialWindow, undeclared
	if value != nil {
		s.userValue.Store(value)
	}
	c.streams[id] = s
	return s
}

// Value returns what SetValue has set, or nil.
func (s *Stream) Value() any { return s.userValue.Load() }

// SetValue attaches a value to the stream. All values of a stream have the same type.
func (s *Stream) SetValue(v any) { s.userValue.Store(v) }

// Open opens a stream of a client. It returns nil if the server accepts none.
func (c *Conn) Open(value any, fields []hpack.HeaderField, end bool) *Stream {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.canOpen() {
		return nil
	}
	s := c.newStream(c.nextStreamID, value)
	c.nextStreamID += 2
	c.writeHeaderBlock(s, fields, end)
	return s
}

// Headers sends header fields after the queued data. The second ones of a server are the trailer,
// and have the end.
func (s *Stream) Headers(fields []hpack.HeaderField, end bool) {
	c := s.conn
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.closed || s.ended || s.localEnd || s.endQueued:
	case len(s.queue) > 0:
		s.trailer, s.endQueued = fields, end
	default:
		c.writeHeaderBlock(s, fields, end)
	}
}

// writeHeaderBlock writes header fields in as many frames as necessary.
func (c *Conn) writeHeaderBlock(s *Stream, fields []hpack.HeaderField, end bool) {
	block := c.encoder.encode(fields)
	first := block[:min(len(block), c.peerMaxFrame)]
	block = block[len(first):]
	_ = c.write.WriteHeaders(http2.HeadersFrameParam{
		StreamID: s.id, BlockFragment: first, EndStream: end, EndHeaders: len(block) == 0,
	})
	for len(block) > 0 {
		next := block[:min(len(block), c.peerMaxFrame)]
		block = block[len(next):]
		_ = c.write.WriteContinuation(s.id, len(block) == 0, next)
	}
	c.pings.reset = true
	if end {
		c.endSent(s)
	}
}

// endSent notes that END_STREAM was sent. A server that has responded ignores the rest of the
// request, and a client that has the whole response sends nothing more.
func (c *Conn) endSent(s *Stream) {
	s.localEnd = true
	switch {
	case s.remoteEnd:
		s.end()
	case c.server:
		_ = c.write.WriteRSTStream(s.id, http2.ErrCodeNo)
		s.end()
	}
}

// Reset ends a stream at once, and drops its queued data.
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

// Finish ends a client's stream after the server has ended it: its request is not needed any more.
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

// HasQueued reports whether data waits for a flow-control window.
func (s *Stream) HasQueued() bool {
	s.conn.mu.Lock()
	defer s.conn.mu.Unlock()
	return len(s.queue) > 0
}

// end removes the stream from the connection. The caller holds conn.mu.
func (s *Stream) end() {
	if s.ended {
		return
	}
	s.ended = true
	c := s.conn
	if c.server && s.remoteEnd {
		c.recentlyEnded.add(s.id)
	}
	delete(c.streams, s.id)
	s.free()
	s.release()
	c.startIdleTimer()
}

// free drops the queued data.
func (s *Stream) free() {
	s.countQueued(-s.queuedBytes)
	s.queue.Free()
	s.queue, s.offset = nil, 0
}
