package http2conn

import (
	"fmt"
	"runtime"
	"strings"

	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// maxText is the longest text of a GOAWAY frame that quotes what the peer has sent.
const maxText = 4 << 10

// turnRequests is how many requests of a connection are handled before other connections have their
// turn. A request takes longer than any other frame.
const turnRequests = 16

// headers handles a header block: a new request, a response header, or a trailer.
func (c *Conn) headers(f *headerFrame) error {
	if c.server {
		return c.request(f)
	}
	if f.truncated {
		c.resetStream(f.StreamID, http2.ErrCodeFrameSize)
		return nil
	}
	c.mu.Lock()
	s := c.streams[f.StreamID]
	ended := s != nil && s.remoteEnd
	if s != nil && f.ends() && !ended {
		if s.remoteEnd = true; s.localEnd {
			s.end() // the handler need not finish it
		}
	}
	c.mu.Unlock()
	switch {
	case s == nil: // this side has ended it
	case ended:
		c.resetStream(s.id, http2.ErrCodeStreamClosed)
	default:
		c.cfg.Handler.Headers(s, f.fields, f.ends())
	}
	return nil
}

// request begins a stream of a client, or ends one by a trailer.
func (c *Conn) request(f *headerFrame) error {
	id := f.StreamID
	if id <= c.lastStreamID {
		c.mu.Lock()
		s := c.streams[id]
		c.mu.Unlock()
		if s != nil {
			c.trailer(s, f)
			return nil
		}
	}
	if id%2 != 1 || id <= c.lastStreamID {
		// as grpc-go
		text := fmt.Sprintf("received an illegal stream id: %v. headers frame: %+v", id, f.FrameHeader)
		return &violation{http2.ErrCodeProtocol, text[:min(len(text), maxText)]}
	}
	code := http2.ErrCodeNo
	if f.malformed || f.ends() && f.declared > 0 || f.onItself {
		code = http2.ErrCodeProtocol
	}
	c.mu.Lock()
	c.lastStreamID = id
	var s *Stream
	served := id <= c.lastServedID // else the client was told that it is not
	if served && code == http2.ErrCodeNo {
		if s = c.accept(id, f.size); s == nil {
			code = http2.ErrCodeRefusedStream
		}
	}
	if s != nil {
		s.remoteEnd, s.declared = f.ends(), f.declared
		if f.truncated {
			c.writeHeaderBlock(s, headerListTooLarge(f.fields), true)
		}
	}
	c.mu.Unlock()
	switch {
	case code != http2.ErrCodeNo:
		c.resetStream(id, code)
		return nil
	case !served || f.truncated:
		return nil
	}
	c.cfg.Handler.Headers(s, f.fields, f.ends())
	c.closeIfDone()
	if c.turn++; c.turn >= turnRequests {
		c.turn = 0
		runtime.Gosched()
	}
	return nil
}

// headerListTooLarge returns the response to a request with a header list above MaxHeaderListSize,
// of which these are the first fields. gRPC reads its own status from a response with any HTTP
// status.
func headerListTooLarge(fields []hpack.HeaderField) []hpack.HeaderField {
	response := []hpack.HeaderField{{Name: ":status", Value: "431"}}
	for _, f := range fields {
		if f.Name == "content-type" && strings.HasPrefix(f.Value, "application/grpc") {
			return append(response,
				hpack.HeaderField{Name: "content-type", Value: "application/grpc"},
				hpack.HeaderField{Name: "grpc-status", Value: "8"},
				hpack.HeaderField{Name: "grpc-message", Value: textHeaderList})
		}
	}
	return response
}

// trailer ends a request with header fields, which gRPC does not use.
func (c *Conn) trailer(s *Stream, f *headerFrame) {
	c.mu.Lock()
	code := http2.ErrCodeNo
	switch {
	case s.remoteEnd:
		code = http2.ErrCodeStreamClosed
	case f.truncated:
		code = http2.ErrCodeFrameSize
	case !f.ends(), s.declared > 0, f.hasPseudoFields():
		code = http2.ErrCodeProtocol
	default:
		s.remoteEnd = true
	}
	c.mu.Unlock()
	if code != http2.ErrCodeNo {
		c.resetStream(s.id, code)
		return
	}
	c.cfg.Handler.Data(s, nil, true)
	c.closeIfDone()
}
