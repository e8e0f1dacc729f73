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

// packing is a format of compressed files. Snapshots are often kept in one, next to etcd's own
// files or elsewhere.
type packing struct {
	kind       string // as in [File]
	extensions []string
	magics     []string // what such a file begins with
}

var packings = []packing{
	{"gzip", []string{".gz", ".tgz"}, []string{"\x1f\x8b"}},
	{"zip", []string{".zip"}, []string{"PK\x03\x04", "PK\x05\x06", "PK\x07\x08"}},
	{"bzip2", []string{".bz2", ".tbz2"}, []string{"BZh"}},
	{"zstd", []string{".zst", ".zstd", ".tzst"}, []string{"\x28\xb5\x2f\xfd"}},
	{"xz", []string{".xz", ".txz"}, []string{"\xfd7zXZ\x00"}},
	{"lz4", []string{".lz4"}, []string{"\x04\x22\x4d\x18"}},
	{"compress", []string{".Z"}, []string{"\x1f\x9d"}},
	{"7z", []string{".7z"}, []string{"7z\xbc\xaf\x27\x1c"}},
}

// maxNested bounds how often a compressed file may hold another one.
const maxNested = 3

// packingOf returns the format that begins with head, or nil.
func packingOf(head []byte) *packing {
	for i, p := range packings {
		if slices.ContainsFunc(p.magics, func(m string) bool { return bytes.HasPrefix(head, []byte(m)) }) {
			return &packings[i]
		}
	}
	return nil
}

// packingNamed returns the format that a file's name says, or nil.
func packingNamed(path string) *packing {
	for i, p := range packings {
		if slices.Contains(p.extensions, filepath.Ext(path)) {
			return &packings[i]
		}
	}
	return nil
}

// packed looks into a compressed file. What is in it is decompressed piece by piece and searched,
// and nothing is written to disk. A database in it is not decoded: its values are found by their
// keys, in pages as in remains.
func (l *look) packed(ctx context.Context, r *os.File, p *packing) error {
	l.file.Kind = p.kind
	if p.kind != "zip" && p.kind != "gzip" && p.kind != "bzip2" {
		return l.unpacked(ctx, io.NewSectionReader(r, 0, l.file.Bytes), "", 0) // which names it as not looked at
	}
	if l.everyKey() {
		l.damage("it is compressed (%s): values under a rule for every key are not found in it; decompress it, and look at that with --snapshot", p.kind)
	} else {
		l.file.Notes = append(l.file.Notes, fmt.Sprintf("it is compressed (%s): what is in it was searched, and not decoded", p.kind))
	}
	if p.kind != "zip" {
		return l.unpacked(ctx, io.NewSectionReader(r, 0, l.file.Bytes), "", 0)
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

func (l *look) everyKey() bool { return slices.Contains(l.Prefixes, "") }

// entryOf looks into one file of a zip archive.
func (l *look) entryOf(ctx context.Context, f *zip.File) error {
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
	return l.unpacked(ctx, r, fmt.Sprintf(" entry %q", f.Name), 1)
}

// unpacked searches what r yields, decompressed if it is compressed again. where tells of it in
// findings.
func (l *look) unpacked(ctx context.Context, r io.Reader, where string, depth int) error {
	in := bufio.NewReaderSize(r, 64<<10)
	head, err := in.Peek(8)
	if err != nil && !errors.Is(err, io.EOF) {
		l.damage("%scannot be read: %v", subject(where), err)
		return nil
	}
	p := packingOf(head)
	if p == nil {
		defer func(before string) { l.where = before }(l.where)
		l.where = where
		err := l.search(ctx, in, -1, nil)
		if err != nil && ctx.Err() == nil { // it does not decompress
			l.damage("%scannot be decompressed to its end: %v", subject(where), err)
			err = nil
		}
		return err
	}
	var inner io.Reader
	switch {
	case depth >= maxNested:
		l.damage("%sis compressed more than %d times: what is in it was not looked at", subject(where), maxNested)
		return nil
	case p.kind == "gzip":
		inner, err = gzip.NewReader(in)
	case p.kind == "bzip2":
		inner = bzip2.NewReader(in)
	default:
		l.damage("%sis compressed (%s): what is in it was not looked at; decompress it, and look at that with --snapshot", subject(where), p.kind)
		return nil
	}
	if err != nil {
		l.damage("%scannot be decompressed: %v", subject(where), err)
		return nil
	}
	return l.unpacked(ctx, inner, where+" decompressed", depth+1)
}

// subject begins a sentence about where.
func subject(where string) string {
	if where == "" {
		return "it "
	}
	return strings.TrimPrefix(where, " ") + " "
}
