package auditlog

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"hash"
	"io"
)

// readLine is a line, or a piece of a long one.
type readLine struct {
	text  []byte // without its line break; valid until the next one is read
	ended bool   // with a line break
	cut   bool   // a piece of a line that is longer than any record
}

// lines reads a file line by line. A line that is longer than a record can be comes in pieces, so
// that memory is bounded whatever the file holds.
type lines struct {
	r     *bufio.Reader
	inCut bool
}

func newLines(r io.Reader) *lines { return &lines{r: bufio.NewReaderSize(r, maxLine+1)} }

// next returns the next line; the error is io.EOF after the last.
func (l *lines) next() (readLine, error) {
	text, err := l.r.ReadSlice('\n')
	switch {
	case errors.Is(err, bufio.ErrBufferFull):
		l.inCut = true
		return readLine{text: text, cut: true}, nil
	case errors.Is(err, io.EOF) && len(text) == 0, err != nil && !errors.Is(err, io.EOF):
		return readLine{}, err
	}
	text, ended := trimBreak(text)
	out := readLine{text: text, ended: ended, cut: l.inCut}
	l.inCut = false
	return out, nil
}

// invalidLines are lines that are no records, as a record of event torn describes them: with every
// line break, or all but the last.
type invalidLines struct {
	first   int // the number of the first
	lines   int
	bytes   int64
	ended   bool
	without string    // the hash without the last line break
	all     hash.Hash // of all bytes
	inLine  bool
}

func newInvalidLines(first int) *invalidLines { return &invalidLines{first: first, all: sha256.New()} }

func (o *invalidLines) add(l readLine) {
	if !o.inLine {
		o.lines++
	}
	o.inLine = !l.ended
	o.all.Write(l.text)
	o.bytes += int64(len(l.text))
	o.ended = l.ended
	if l.ended {
		o.without = hex.EncodeToString(o.all.Sum(nil))
		o.all.Write([]byte{'\n'})
		o.bytes++
	}
}

// is reports whether size and digest describe the lines.
func (o *invalidLines) is(size int64, digest string) bool {
	return size == o.bytes && digest == hex.EncodeToString(o.all.Sum(nil)) || o.ended && size == o.bytes-1 && digest == o.without
}

// trimBreak returns a line without its line break.
func trimBreak(text []byte) ([]byte, bool) { return bytes.CutSuffix(text, []byte{'\n'}) }
