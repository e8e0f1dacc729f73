// Package etcdfile looks into etcd's files for values that can be read without a KMS: database
// files with their live and freed pages, write-ahead logs, snapshots, and whatever else lies beside
// them. It opens files for reading alone, and needs no etcd.
//
// Two ways go side by side. What is well-formed is decoded: each revision in the database, each
// request in the log. And the bytes of every file are searched, for what is left of values in freed
// pages and torn records, for objects of Kubernetes, and for strings that the caller knows.
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

// Config says what to look for.
type Config struct {
	// Judge tells why a value under an etcd key should not be readable, and "" if all is well.
	// whole is false for the beginning of a value whose rest is lost. It keeps no argument.
	Judge func(key, value []byte, whole bool) string
	// Prefixes are of the keys that Judge has something to say of. Values below "" are found where
	// files are well-formed, and not in remains.
	Prefixes []string
	// Kinds are of Kubernetes objects that should not be readable, "Secret" for example.
	Kinds []string
	// Canaries are strings that should not be found anywhere, nor in base64.
	Canaries [][]byte
	// Found is told of each finding. It keeps nothing that it is given but strings.
	Found func(Finding)
}

// Place is where in a file a finding is.
type Place string

// The places.
const (
	Live    Place = "live"    // the present value of a key in a database
	History Place = "history" // an older revision in a database
	Log     Place = "log"     // a request in a write-ahead log
	Remains Place = "remains" // bytes that nothing refers to any more: freed pages, torn records
	Object  Place = "object"  // an object of one of Config.Kinds, anywhere
	Canary  Place = "canary"  // one of Config.Canaries, anywhere
)

// Finding is a place where something is readable.
type Finding struct {
	File     string `json:"file"` // of a compressed one with what of it, as " decompressed" or ` entry "etcd.db"`
	Place    Place  `json:"place"`
	Key      string `json:"key,omitempty"`      // the etcd key; of an object its kind
	Revision int64  `json:"revision,omitempty"` // where it is known
	Offset   int64  `json:"offset"`             // in the file, or in what was decompressed of it, in bytes; -1 for what a database was asked for
	Why      string `json:"why"`
}

// File is what was looked at.
type File struct {
	Path   string   `json:"path"`
	Kind   string   `json:"kind"` // "database", "log", a format of compressed files ("gzip", "zip", "bzip2", "zstd", "xz", "lz4", "compress", "7z"), or "other"
	Bytes  int64    `json:"bytes"`
	Values int64    `json:"values"` // that were decoded
	Notes  []string `json:"notes"`
	// Damaged says that something could not be decoded, and was searched alone: Notes says what.
	Damaged bool `json:"damaged"`
}

// Look looks into one file. What is damaged is noted and searched all the same; the error is of a
// file that cannot be read, and of ctx.
func Look(ctx context.Context, path string, c Config) (File, error) {
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
	l := &look{Config: c, file: &f, known: make(map[string]bool)}
	decoded := spans{}
	head := make([]byte, 8)
	n, _ := r.ReadAt(head, 0) // what cannot be read is an error below
	switch p, named := packingOf(head[:n]), packingNamed(path); {
	case p != nil:
		err = l.packed(ctx, r, p)
	case named != nil:
		l.damage("its name is that of a compressed file (%s), and it does not begin like one", named.kind)
	case strings.HasSuffix(path, ".wal"):
		f.Kind = "log"
		decoded = l.log(ctx, io.NewSectionReader(r, 0, f.Bytes))
	case isDatabase(r):
		f.Kind = "database"
		err = l.database(ctx, path)
	case filepath.Base(path) == "db" || filepath.Ext(path) == ".db":
		l.damage("its name is that of a database, and it does not begin like one")
	}
	if err != nil {
		return f, err
	}
	return f, l.search(ctx, io.NewSectionReader(r, 0, f.Bytes), f.Bytes, decoded)
}

// look is the work on one file.
type look struct {
	Config
	file  *File
	where string          // within the file, of what is compressed
	known map[string]bool // values that were told where they are decoded, for remains not to tell them again
}

// maxKnown bounds what is remembered of a file.
const maxKnown = 1 << 20

func (l *look) damage(format string, args ...any) {
	l.file.Notes = append(l.file.Notes, fmt.Sprintf(format, args...))
	l.file.Damaged = true
}

func (l *look) found(f Finding) {
	f.File = l.file.Path + l.where
	if l.Found != nil {
		l.Found(f)
	}
}

func identity(key []byte, revision int64) string { return fmt.Sprintf("%d %s", revision, key) }

// errLocked says that somebody writes the file.
var errLocked = errors.New("a running etcd holds the file: stop that member, or look at a snapshot")
