package http2conn

import (
	"errors"
	"strings"

	"golang.org/x/net/http/httpguts"
	"golang.org/x/net/http2"
	"golang.org/x/net/http2/hpack"
)

// headerFrame is a HEADERS frame with its decoded header block, which may have been continued by
// CONTINUATION frames.
type headerFrame struct {
	http2.FrameHeader
	headerList
	selfDependent bool // it has a priority that depends on its own stream
}

// ends reports whether the frame has END_STREAM.
func (f *headerFrame) ends() bool { return f.Flags.Has(http2.FlagHeadersEndStream) }

// headerList is a decoded header block. Its fields may be shared with other streams and do not
// change.
type headerList struct {
	fields    []hpack.HeaderField
	size      int   // of the fields, by RFC 9113, section 6.5.2
	declared  int64 // content length, or undeclared; of a strict server
	malformed bool  // it is no request by RFC 9113, section 8; of a strict server
	truncated bool  // it exceeds the limit, and these are the first fields
}

// inspect completes a header list.
func (l *headerList) inspect(strict bool) {
	l.size, l.declared = 0, undeclared
	for i := range l.fields {
		l.size += int(l.fields[i].Size())
	}
	if strict && !l.truncated {
		var ok bool
		l.declared, ok = checkRequest(l.fields)
		l.malformed = !ok
	}
}

// hasPseudoFields reports whether there are pseudo-header fields, which come first.
func (l *headerList) hasPseudoFields() bool { return len(l.fields) > 0 && l.fields[0].IsPseudo() }

// Errors of header fields, by which the peer's stream is reset.
var (
	errFieldName        = errors.New("invalid header field name")
	errFieldValue       = errors.New("invalid header field value")
	errPseudoOrder      = errors.New("pseudo-header field after a regular one")
	errPseudoUnknown    = errors.New("unknown pseudo-header field")
	errPseudoRepeated   = errors.New("repeated pseudo-header field")
	errPseudoOfResponse = errors.New("pseudo-header fields of a request and a response")
)

// headerDecoder decodes header blocks that arrive in one frame, by the rules of [http2.Framer] with
// ReadMetaHeaders, which decodes the others with the same [hpack.Decoder]. The limit must be so
// large that http2.Framer decodes every block of one frame: a quarter of a frame. It belongs to one
// goroutine.
type headerDecoder struct {
	hpack  *hpack.Decoder
	limit  uint32 // of the header list
	strict bool   // requests must follow RFC 9113, section 8
	memo   blockMemo[headerList]
	emit   func(hpack.HeaderField) // d.field

	// The state of the block that is being decoded.
	fields       []hpack.HeaderField
	left         uint32 // of limit
	trailersLeft uint32 // of the limit of fields that announce trailers
	regular      bool   // a regular field was decoded
	truncated    bool
	invalid      error
}

func newHeaderDecoder(limit uint32) *headerDecoder {
	d := &headerDecoder{hpack: hpack.NewDecoder(tableSize, nil), limit: limit}
	d.emit = d.field
	return d
}

// decode returns the header list of a block. An error is an [http2.StreamError] or a violation.
func (d *headerDecoder) decode(streamID uint32, block []byte) (headerList, error) {
	stateless := indexedOnly(block)
	if stateless {
		if list := d.memo.find(block); list != nil {
			return *list, nil
		}
	} else {
		d.memo.clear()
	}
	list, err := d.decodeNew(block)
	switch {
	case err == nil:
	case errors.Is(err, errBlock):
		return list, &violation{http2.ErrCodeCompression, textHeaders}
	default:
		return list, http2.StreamError{StreamID: streamID, Code: http2.ErrCodeProtocol, Cause: err}
	}
	list.inspect(d.strict)
	if stateless && !list.truncated {
		d.memo.add(block, list)
	}
	return list, nil
}

// errBlock is the error of a block that is no HPACK.
var errBlock = errors.New("malformed header block")

func (d *headerDecoder) decodeNew(block []byte) (list headerList, err error) {
	d.left, d.trailersLeft = d.limit, d.limit
	d.regular, d.truncated, d.invalid = false, false, nil
	d.hpack.SetEmitEnabled(true)
	d.hpack.SetMaxStringLength(int(d.limit))
	d.hpack.SetEmitFunc(d.emit)
	_, err = d.hpack.Write(block)
	if err == nil {
		err = d.hpack.Close()
	}
	list.fields, list.truncated = append([]hpack.HeaderField(nil), d.fields...), d.truncated
	clear(d.fields)
	if d.fields = d.fields[:0]; cap(d.fields) > maxScratch {
		d.fields = nil
	}
	switch {
	case err != nil:
		return list, errBlock
	case d.invalid != nil:
		return list, d.invalid
	}
	return list, checkPseudoFields(list.fields)
}

// maxScratch is for how many fields a decoder keeps memory.
const maxScratch = 64

// field takes the next field of a block.
func (d *headerDecoder) field(f hpack.HeaderField) {
	switch {
	case !httpguts.ValidHeaderFieldValue(f.Value):
		d.invalid = errFieldValue
	case !f.IsPseudo():
		if d.regular = true; !validFieldName(f.Name) {
			d.invalid = errFieldName
		}
	case d.regular:
		d.invalid = errPseudoOrder
	}
	if d.invalid != nil {
		d.hpack.SetEmitEnabled(false)
		return
	}
	left, size := &d.left, f.Size()
	if f.Name == "trailer" { // http2.Framer counts the fields that it announces
		n := uint32(strings.Count(f.Value, ",")) + 1 //nolint:gosec // less than a frame
		length := uint32(len(f.Value))               //nolint:gosec // less than 16 MiB
		left, size = &d.trailersLeft, length-n+1+n*hpack.HeaderField{}.Size()
	}
	if size > *left {
		d.hpack.SetEmitEnabled(false)
		d.truncated = true
		return
	}
	*left -= size
	d.fields = append(d.fields, f)
}

// validFieldName reports whether a name is one of HTTP/2: a token without capitals.
func validFieldName(name string) bool {
	for _, r := range name {
		if !httpguts.IsTokenRune(r) || 'A' <= r && r <= 'Z' {
			return false
		}
	}
	return name != ""
}

// checkPseudoFields checks the pseudo-header fields, which are the first ones.
func checkPseudoFields(fields []hpack.HeaderField) error {
	request, response := false, false
	for i, f := range fields {
		if !f.IsPseudo() {
			break
		}
		switch f.Name {
		case ":method", ":path", ":scheme", ":authority", ":protocol":
			request = true
		case ":status":
			response = true
		default:
			return errPseudoUnknown
		}
		for _, before := range fields[:i] {
			if before.Name == f.Name {
				return errPseudoRepeated
			}
		}
	}
	if request && response {
		return errPseudoOfResponse
	}
	return nil
}
