package auditlog

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
)

// tornLine is what follows the last whole record of a file.
type tornLine struct {
	bytes int64
	hash  string
}

// fileEnd is the state of the end of a file.
type fileEnd struct {
	found        bool // there is a record
	seq          uint64
	hash         sum
	chainKey     string
	whole        int64     // bytes up to the end of the last whole record
	size         int64     // of the file
	torn         *tornLine // nil if the file ends with a whole record
	unterminated bool      // the last byte is not a line break
}

// maxDamage is how far back from its end a file is searched for a record.
const maxDamage = 1 << 20

// readEnd finds the last whole record of f. A file that is not empty and has none within reach is
// refused unless it begins like a log: the path may be wrong.
func readEnd(f *os.File) (fileEnd, error) {
	info, err := f.Stat()
	if err != nil {
		return fileEnd{}, err
	}
	end := fileEnd{size: info.Size()}
	if end.size == 0 {
		return end, nil
	}
	from := max(0, end.size-maxDamage)
	tail := make([]byte, end.size-from)
	if _, err := f.ReadAt(tail, from); err != nil {
		return end, fmt.Errorf("read its end: %w", err)
	}
	end.unterminated = tail[len(tail)-1] != '\n'
	// The last line that is a record counts. The last of all may lack no more than its line break.
	for rest := tail; len(rest) > 0 && !end.found; {
		text, _ := trimBreak(rest)
		start := bytes.LastIndexByte(text, '\n') + 1
		if w, err := parse(text[start:]); err == nil && (start > 0 || from == 0) {
			end.found, end.seq, end.hash, end.chainKey, end.whole = true, w.Seq, w.hash, w.ChainKey, from+int64(len(rest))
		}
		rest = rest[:start]
	}
	if !end.found && (from > 0 || !beginsLikeLog(tail)) {
		return end, errors.New("it is not an audit log, or its end is damaged: move it away, or correct the path")
	}
	if end.whole < end.size {
		end.torn, err = readTorn(f, end.whole, end.size)
	}
	return end, err
}

func beginsLikeLog(text []byte) bool {
	n := min(len(text), len(lineStart))
	return string(text[:n]) == lineStart[:n]
}

// readTorn describes the bytes of f from one offset to another.
func readTorn(f io.ReaderAt, from, to int64) (*tornLine, error) {
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(f, from, to-from)); err != nil {
		return nil, fmt.Errorf("read its end: %w", err)
	}
	return &tornLine{bytes: to - from, hash: hex.EncodeToString(h.Sum(nil))}, nil
}
