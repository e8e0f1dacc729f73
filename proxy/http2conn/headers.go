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
func (c *Conn) headers(f *http2.MetaHeadersFrame) error {
	if c.server {
		return c.request(f)
	}
	if f.Truncated {
		c.resetStream(f.StreamID, http2.ErrCodeFrameSize)
		return nil
	}
	c.mu.Lock()
	s := c.streams[f.StreamID]
	ended := s != nil && s.remoteEnd
	if s != nil && f.StreamEnded() {
		s.remoteEnd = true
	}
	c.mu.Unlock()
	switch {
	case s == nil: // this side has ended it
	case ended:
		c.resetStream(s.id, http2.ErrCodeStreamClosed)
	default:
		c.cfg.Handler.Headers(s, f.Fields, f.StreamEnded())
	}
	return nil
}

// request begins a stream of a client, or ends one by a trailer.
func (c *Conn) request(f *http2.MetaHeadersFrame) error {
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
		text := fmt.Sprintf("received an illegal stream id: %v. headers frame: %+v", id, f) // as grpc-go
		return &violation{http2.ErrCodeProtocol, text[:min(len(text), maxText)]}
	}
	length, code := int64(undeclared), http2.ErrCodeNo
	if c.cfg.Strict && !f.Truncated {
		var ok bool
		if length, ok = checkRequest(f.Fields); !ok || f.StreamEnded() && length > 0 {
			code = http2.ErrCodeProtocol
		}
	}
	if f.HasPriority() && f.Priority.StreamDep == id {
		code = http2.ErrCodeProtocol
	}
	c.mu.Lock()
	c.lastStreamID = id
	var s *Stream
	served := id <= c.lastServedID // else the client was told that it is not
	if served && code == http2.ErrCodeNo {
		if s = c.accept(id, f.Fields); s == nil {
			code = http2.ErrCodeRefusedStream
		}
	}
	if s != nil {
		s.remoteEnd, s.declared = f.StreamEnded(), length
		if f.Truncated {
			c.writeHeaderBlock(s, headerListTooLarge(f.Fields), true)
		}
	}
	c.mu.Unlock()
	switch {
	case code != http2.ErrCodeNo:
		c.resetStream(id, code)
		return nil
	case !served || f.Truncated:
		return nil
	}
	c.cfg.Handler.Headers(s, f.Fields, f.StreamEnded())
	c.closeIfDone()
	if c.turn++; c.turn >= turnRequests {
		c.turn = 0
		runtime.Gosched()
	}
	return nil
}

// headerListTooLarge returns the response to a request with a header list above MaxHeaderListSize, of
// which these are the first fields. gRPC reads its own status from a response with any HTTP status.
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
func (c *Conn) trailer(s *Stream, f *http2.MetaHeadersFrame) {
	c.mu.Lock()
	code := http2.ErrCodeNo
	switch {
	case s.remoteEnd:
		code = http2.ErrCodeStreamClosed
	case f.Truncated:
		code = http2.ErrCodeFrameSize
	case !f.StreamEnded(), s.declared > 0, len(f.PseudoFields()) > 0:
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
