// Package etcdfile finds values in etcd's files that can be read without a KMS: in database files
// with their live and freed pages, write-ahead logs, snapshots, and any other files next to them.
// It only reads files, and needs no running etcd.
//
// Each file is examined in two ways. Well-formed data is decoded: each revision in the database,
// each request in the log. In addition, the bytes of every file are searched for remains of values
// in freed pages and torn records, for Kubernetes objects, and for canary strings.
package etcdfile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
)

// Config says what [Inspect] searches for.
type Config struct {
	// Judge returns why a value under an etcd key is a finding, or "" if it is none. complete is
	// false for the beginning of a value whose rest is lost. Judge does not retain its arguments.
	Judge func(key, value []byte, complete bool) string
	// Prefixes are those of the keys whose values Judge may report. With the prefix "", values are
	// only found in well-formed data, not in remains.
	Prefixes []string
	// Kinds are the Kubernetes kinds whose objects are findings, "Secret" for example.
	Kinds []string
	// Canaries are strings that are findings anywhere, also in base64.
	Canaries [][]byte
	// Found is called with each finding.
	Found func(Finding)
}

// Place is where in a file a finding is.
type Place string

// The places.
const (
	Live    Place = "live"    // the current value of a key in a database
	History Place = "history" // an older revision in a database
	Log     Place = "log"     // a request in a write-ahead log
	Remains Place = "remains" // bytes that are no longer referenced: freed pages, torn records
	Object  Place = "object"  // an object of one of Config.Kinds, anywhere
	Canary  Place = "canary"  // one of Config.Canaries, anywhere
)

// Finding is a place where plaintext was found.
type Finding struct {
	// with the part of a compressed file: " decompressed" or ` entry "etcd.db"`
	File     string `json:"file"`
	Place    Place  `json:"place"`
	Key      string `json:"key,omitempty"`      // the etcd key, or the kind of an object
	Revision int64  `json:"revision,omitempty"` // 0 if it was lost
	// in bytes, in the file or its decompressed content; -1 for a decoded revision of a database
	Offset int64  `json:"offset"`
	Why    string `json:"why"`
}

// File describes an inspected file.
type File struct {
	Path string `json:"path"`
	// "database", "log", a format of compressed files ("gzip", "zip", "bzip2", "zstd", "xz", "lz4",
	// "compress", "7z"), or "other"
	Kind   string   `json:"kind"`
	Bytes  int64    `json:"bytes"`
	Values int64    `json:"values"` // decoded
	Notes  []string `json:"notes"`
	// Damaged is set if a part could not be decoded and was only searched. Notes says which part.
	Damaged bool `json:"damaged"`
}

// Inspect examines one file. A damaged file is noted and searched nevertheless. The error is that
// of reading the file, or of ctx.
func Inspect(ctx context.Context, path string, c Config) (File, error) {
	f := File{Path: path, Kind: "other", Notes: []string{}}
	r, err := os.Open(path) //nolint:gosec // the operator names the file
	if err != nil {
		return f, err
	}
	defer func() { _ = r.Close() }() // it was only read
	info, err := r.Stat()
	if err != nil {
		return f, err
	}
	f.Bytes = info.Size()
	l := &inspection{Config: c, file: &f, reported: make(map[string]bool)}
	decoded := spans{}
	head := make([]byte, 8)
	n, _ := r.ReadAt(head, 0) // what cannot be read is an error below
	switch p, named := compressionOf(head[:n]), compressionNamed(path); {
	case p != nil:
		err = l.compressed(ctx, r, p)
	case named != nil:
		l.damage("it is named like a compressed file (%s), and is none", named.kind)
	case strings.HasSuffix(path, ".wal"):
		f.Kind = "log"
		decoded = l.log(ctx, io.NewSectionReader(r, 0, f.Bytes))
	case isDatabase(r):
		f.Kind = "database"
		err = l.database(ctx, path)
	case filepath.Base(path) == "db" || filepath.Ext(path) == ".db":
		l.damage("it is named like a database, and is none")
	}
	if err != nil {
		return f, err
	}
	return f, l.search(ctx, io.NewSectionReader(r, 0, f.Bytes), f.Bytes, decoded)
}

// inspection is the state of one call of [Inspect].
type inspection struct {
	Config
	file     *File
	where    string          // the part of a compressed file, as in Finding.File
	reported map[string]bool // decoded values that were reported, so that remains of them are not
}

// maxReported is the maximum number of values of a file that are reported and remembered.
const maxReported = 1 << 20

func (l *inspection) damage(format string, args ...any) {
	l.file.Notes = append(l.file.Notes, fmt.Sprintf(format, args...))
	l.file.Damaged = true
}

func (l *inspection) found(f Finding) {
	f.File = l.file.Path + l.where
	if l.Found != nil {
		l.Found(f)
	}
}

func identityOf(key []byte, revision int64) string { return fmt.Sprintf("%d %s", revision, key) }

// errLocked is returned for a file that a running etcd has locked.
var errLocked = errors.New("a running etcd has locked the file: stop that member, or inspect a snapshot")
