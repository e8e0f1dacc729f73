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
)

// violated returns the violation behind an error of the reader, or nil if the peer is not to blame
// and there is nobody to tell: the connection broke, or has come to its end.
func (c *Conn) violated(err error) *violation {
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
	if detail := c.framer.ErrorDetail(); detail != nil {
		v.text = detail.Error()
	}
	return v
}

// idleStream reports whether a client has not opened the stream yet. Of the streams that this side
// opens it does not ask: a server may still send on those that have ended here.
func (c *Conn) idleStream(id uint32) bool { return c.server && (id%2 == 0 || id > c.last) }

// opened notes the stream of a HEADERS frame that is wrong: it has been opened, if only to be
// refused, and its client must not take it for one that was not looked at.
func (c *Conn) opened() {
	if c.server && c.head.Type == http2.FrameHeaders && c.head.StreamID%2 == 1 {
		c.mu.Lock()
		c.last = max(c.last, c.head.StreamID)
		c.mu.Unlock()
	}
}

// refuseFrame answers a frame that the framer has read whole and found wrong on its stream alone.
func (c *Conn) refuseFrame(bad http2.StreamError) error {
	c.opened()
	if c.idleStream(bad.StreamID) {
		return &violation{bad.Code, textIdle}
	}
	c.refuse(bad.StreamID, bad.Code)
	return nil
}

// endedLength is how many streams are remembered that the client has ended.
const endedLength = 16

// endedStreams are the last streams that the client has ended, by END_STREAM or RST_STREAM: data
// on these is an error of the client. Data on others may have been on its way when this side reset
// the stream, and is ignored.
type endedStreams struct {
	ids  [endedLength]uint32
	next uint8
}

func (e *endedStreams) add(id uint32) {
	e.ids[e.next] = id
	e.next = (e.next + 1) % endedLength
}

// take reports whether the client has ended the stream, and forgets it: one answer is enough.
func (e *endedStreams) take(id uint32) bool {
	i := slices.Index(e.ids[:], id)
	if i >= 0 {
		e.ids[i] = 0
	}
	return i >= 0
}
