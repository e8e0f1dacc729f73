package etcdfile

import (
	"archive/zip"
	"bufio"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
)

// compression is a format of compressed files, in which snapshots are often kept.
type compression struct {
	kind       string // as in [File]
	extensions []string
	magics     []string // the first bytes of such a file
}

var compressions = []compression{
	{"gzip", []string{".gz", ".tgz"}, []string{"\x1f\x8b"}},
	{"zip", []string{".zip"}, []string{"PK\x03\x04", "PK\x05\x06", "PK\x07\x08"}},
	{"bzip2", []string{".bz2", ".tbz2"}, []string{"BZh"}},
	{"zstd", []string{".zst", ".zstd", ".tzst"}, []string{"\x28\xb5\x2f\xfd"}},
	{"xz", []string{".xz", ".txz"}, []string{"\xfd7zXZ\x00"}},
	{"lz4", []string{".lz4"}, []string{"\x04\x22\x4d\x18"}},
	{"compress", []string{".Z"}, []string{"\x1f\x9d"}},
	{"7z", []string{".7z"}, []string{"7z\xbc\xaf\x27\x1c"}},
}

// maxNested is the maximum depth of compressed files within compressed files.
const maxNested = 3

// compressionOf returns the format of a file that begins with head, or nil.
func compressionOf(head []byte) *compression {
	for i, p := range compressions {
		if slices.ContainsFunc(p.magics, func(m string) bool { return bytes.HasPrefix(head, []byte(m)) }) {
			return &compressions[i]
		}
	}
	return nil
}

// compressionNamed returns the format that the extension of a file's name stands for, or nil.
func compressionNamed(path string) *compression {
	for i, p := range compressions {
		if slices.Contains(p.extensions, filepath.Ext(path)) {
			return &compressions[i]
		}
	}
	return nil
}

// compressed searches a compressed file. It decompresses the content as a stream and writes nothing
// to disk. It does not decode a database in it: the search finds values by their keys, in live
// pages as in remains.
func (l *inspection) compressed(ctx context.Context, r *os.File, p *compression) error {
	l.file.Kind = p.kind
	if p.kind != "zip" && p.kind != "gzip" && p.kind != "bzip2" {
		// which notes that it was not searched
		return l.decompress(ctx, io.NewSectionReader(r, 0, l.file.Bytes), "", 0)
	}
	if l.everyKey() {
		l.damage("it is compressed (%s): values under a rule for every key are not found in it; decompress it, and inspect the result with --snapshot", p.kind)
	} else {
		l.file.Notes = append(l.file.Notes, fmt.Sprintf("it is compressed (%s): its content was searched, and not decoded", p.kind))
	}
	if p.kind != "zip" {
		return l.decompress(ctx, io.NewSectionReader(r, 0, l.file.Bytes), "", 0)
	}
	archive, err := zip.NewReader(r, l.file.Bytes)
	if err != nil {
		l.damage("it is compressed (zip), and cannot be read: %v", err)
		return nil
	}
	for _, f := range archive.File {
		if f.Mode().IsDir() {
			continue
		}
		if err := l.entryOf(ctx, f); err != nil {
			return err
		}
	}
	return nil
}

func (l *inspection) everyKey() bool { return slices.Contains(l.Prefixes, "") }

// entryOf searches one file of a zip archive.
func (l *inspection) entryOf(ctx context.Context, f *zip.File) error {
	const encrypted = 1
	if f.Flags&encrypted != 0 {
		l.damage("entry %q is encrypted", f.Name)
		return nil
	}
	r, err := f.Open()
	if err != nil {
		l.damage("entry %q cannot be read: %v", f.Name, err)
		return nil
	}
	defer func() { _ = r.Close() }() // it was only read
	return l.decompress(ctx, r, fmt.Sprintf(" entry %q", f.Name), 1)
}

// decompress searches the content of r, decompressed if it is compressed itself. where names it in
// findings.
func (l *inspection) decompress(ctx context.Context, r io.Reader, where string, depth int) error {
	in := bufio.NewReaderSize(r, 64<<10)
	head, err := in.Peek(8)
	if err != nil && !errors.Is(err, io.EOF) {
		l.damage("%scannot be read: %v", subject(where), err)
		return nil
	}
	p := compressionOf(head)
	if p == nil {
		defer func(before string) { l.where = before }(l.where)
		l.where = where
		err := l.search(ctx, in, -1, nil)
		if err != nil && ctx.Err() == nil { // the compressed data is damaged
			l.damage("%scannot be decompressed to its end: %v", subject(where), err)
			err = nil
		}
		return err
	}
	var inner io.Reader
	switch {
	case depth >= maxNested:
		l.damage("%sis compressed more than %d times: its content was not searched", subject(where), maxNested)
		return nil
	case p.kind == "gzip":
		inner, err = gzip.NewReader(in)
	case p.kind == "bzip2":
		inner = bzip2.NewReader(in)
	default:
		l.damage("%sis compressed (%s): its content was not searched; decompress it, and inspect the result with --snapshot", subject(where), p.kind)
		return nil
	}
	if err != nil {
		l.damage("%scannot be decompressed: %v", subject(where), err)
		return nil
	}
	return l.decompress(ctx, inner, where+" decompressed", depth+1)
}

// subject begins a sentence about where.
func subject(where string) string {
	if where == "" {
		return "it "
	}
	return strings.TrimPrefix(where, " ") + " "
}
