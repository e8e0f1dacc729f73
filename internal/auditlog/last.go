package auditlog

import (
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"slices"
	"time"
)

// Last returns when the newest record of the log at path was written that is matches, or the zero
// time. It reads the log and its older files, newest first, and stops at the first one with such a
// record. It does not check the chain, and skips what is no record.
func Last(path string, is func(Record) bool) (time.Time, error) {
	older, err := rotated(path)
	if errors.Is(err, fs.ErrNotExist) {
		return time.Time{}, nil
	}
	if err != nil {
		return time.Time{}, err
	}
	slices.Reverse(older)
	for _, name := range append([]string{path}, older...) {
		at, err := lastIn(name, is)
		if errors.Is(err, fs.ErrNotExist) { // no log yet, or it was rotated meanwhile
			continue
		}
		if err != nil || !at.IsZero() {
			return at, err
		}
	}
	return time.Time{}, nil
}

// lastIn is Last for one file.
func lastIn(name string, is func(Record) bool) (last time.Time, err error) {
	f, err := os.Open(name) //nolint:gosec // the operator names the file
	if err != nil {
		return last, err
	}
	defer f.Close()
	for lines := newLines(f); ; {
		l, err := lines.next()
		if errors.Is(err, io.EOF) {
			return last, nil
		}
		if err != nil {
			return last, err
		}
		var e entry
		if l.cut || json.Unmarshal(l.text, &e) != nil || !is(e.Record) {
			continue
		}
		if at, err := time.Parse(time.RFC3339Nano, e.Time); err == nil {
			last = at
		}
	}
}
