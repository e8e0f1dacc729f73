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
func (r *receiver) headers(f *headerFrame) error {
	if r.server {
		return r.request(f)
	}
	if f.truncated {
		r.resetStream(f.StreamID, http2.ErrCodeFrameSize)
		return nil
	}
	r.mu.Lock()
	s := r.streams[f.StreamID]
	ended := s != nil && s.remoteEnd
	if s != nil && f.ends() && !ended {
		if s.remoteEnd = true; s.localEnd {
			s.end() // the handler need not finish it
		}
	}
	r.mu.Unlock()
	switch {
	case s == nil: // this side has ended it
	case ended:
		r.resetStream(s.id, http2.ErrCodeStreamClosed)
	default:
		r.cfg.Handler.Headers(s, f.fields, f.ends())
	}
	return nil
}

// request begins a stream of a client, or ends one by a trailer.
func (r *receiver) request(f *headerFrame) error {
	id := f.StreamID
	if id <= r.lastStreamID {
		r.mu.Lock()
		s := r.streams[id]
		r.mu.Unlock()
		if s != nil {
			r.trailer(s, f)
			return nil
		}
	}
	if id%2 != 1 || id <= r.lastStreamID {
		// as grpc-go
		text := fmt.Sprintf("received an illegal stream id: %v. headers frame: %+v", id, f.FrameHeader)
		return &violation{http2.ErrCodeProtocol, text[:min(len(text), maxText)]}
	}
	code := http2.ErrCodeNo
	if f.malformed || f.ends() && f.declared > 0 || f.selfDependent {
		code = http2.ErrCodeProtocol
	}
	r.mu.Lock()
	r.lastStreamID = id
	var s *Stream
	served := id <= r.lastServedID // else the client was told that it is not
	if served && code == http2.ErrCodeNo {
		if s = r.accept(id, f.size); s == nil {
			code = http2.ErrCodeRefusedStream
		}
	}
	if s != nil {
		s.remoteEnd, s.declared = f.ends(), f.declared
		if f.truncated {
			r.send.headerBlock(s, headerListTooLarge(f.fields), hpack.HeaderField{}, true)
		}
	}
	r.mu.Unlock()
	switch {
	case code != http2.ErrCodeNo:
		r.resetStream(id, code)
		return nil
	case !served || f.truncated:
		return nil
	}
	r.cfg.Handler.Headers(s, f.fields, f.ends())
	r.closeIfDone()
	if r.requestsSinceYield++; r.requestsSinceYield >= turnRequests {
		r.requestsSinceYield = 0
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
func (r *receiver) trailer(s *Stream, f *headerFrame) {
	r.mu.Lock()
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
	r.mu.Unlock()
	if code != http2.ErrCodeNo {
		r.resetStream(s.id, code)
		return
	}
	r.cfg.Handler.Data(s, nil, true)
	r.closeIfDone()
}
