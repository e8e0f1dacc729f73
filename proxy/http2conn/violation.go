package http2conn

import (
	"errors"
	"slices"

	"golang.org/x/net/http2"
)

// violation is a breach of the protocol that ends the connection (RFC 9113, section 5.4.1). The
// peer is sent a GOAWAY frame with code and text before the connection closes.
type violation struct {
	code http2.ErrCode
	text string
}

var _ error = (*violation)(nil)

// Error implements error.
func (v *violation) Error() string { return v.text }

// Texts of GOAWAY frames.
const (
	textIdle     = "frame on a stream that was never opened"
	textWindow   = "flow-control window larger than 2^31-1"
	textFrame    = "frame larger than SETTINGS_MAX_FRAME_SIZE"
	textFirst    = "the first frame is not SETTINGS"
	textPreface  = "not the client preface of HTTP/2"
	textPush     = "PUSH_PROMISE from a client"
	textItself   = "stream that depends on itself"
	textSettings = "too_many_settings"
	textShutdown = "graceful_stop"
	textHeaders  = "malformed header block, or header list larger than SETTINGS_MAX_HEADER_LIST_SIZE"
	// textHeaderList is also the status message of a request whose header list is too large.
	textHeaderList = "header list larger than SETTINGS_MAX_HEADER_LIST_SIZE"
)

// connectionError returns the violation behind an error of the reader, or nil if the peer did
// nothing wrong: the connection broke, or was drained.
func (r *receiver) connectionError(err error) *violation {
	if v, ok := errors.AsType[*violation](err); ok {
		return v
	}
	if errors.Is(err, http2.ErrFrameTooLarge) {
		return &violation{http2.ErrCodeFrameSize, textFrame}
	}
	code, ok := errors.AsType[http2.ConnectionError](err)
	if !ok {
		return nil
	}
	v := &violation{code: http2.ErrCode(code)}
	switch detail := r.framer.ErrorDetail(); {
	case detail != nil:
		v.text = detail.Error()
	case r.frameHeader.Type == http2.FrameHeaders:
		v.text = textHeaders
	}
	return v
}

// idleStream reports whether a client has not opened the stream yet. Of the streams that this side
// opens it reports false: a server may still send on those that have ended here.
func (r *receiver) idleStream(id uint32) bool { return r.server && (id%2 == 0 || id > r.lastStreamID) }

// noteOpened counts the stream of a malformed HEADERS frame as opened and refused, so that its
// client does not take it for one that was not processed.
func (r *receiver) noteOpened() {
	if r.server && r.frameHeader.Type == http2.FrameHeaders && r.frameHeader.StreamID%2 == 1 {
		r.mu.Lock()
		r.lastStreamID = max(r.lastStreamID, r.frameHeader.StreamID)
		r.mu.Unlock()
	}
}

// resetMalformed resets the stream of a malformed frame that was read to its end.
func (r *receiver) resetMalformed(bad http2.StreamError) error {
	r.noteOpened()
	if r.idleStream(bad.StreamID) {
		return &violation{bad.Code, textIdle}
	}
	r.resetStream(bad.StreamID, bad.Code)
	return nil
}

// endedLength is how many ended streams a connection remembers.
const endedLength = 16

// endedStreams are the last streams that the client has ended, by END_STREAM or RST_STREAM: data
// on these is an error of the client. Data on others may have been in flight when this side reset
// the stream, and is ignored.
type endedStreams struct {
	ids  [endedLength]uint32
	next uint8
}

func (e *endedStreams) add(id uint32) {
	e.ids[e.next] = id
	e.next = (e.next + 1) % endedLength
}

// take reports whether the client has ended the stream, and removes it: one RST_STREAM is enough.
func (e *endedStreams) take(id uint32) bool {
	i := slices.Index(e.ids[:], id)
	if i >= 0 {
		e.ids[i] = 0
	}
	return i >= 0
}
