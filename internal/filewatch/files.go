// Package filewatch notices that files have changed: certificates, CAs, passwords, keys and the
// configuration, which others replace while the process runs.
//
// [Files] keeps what was made of several files up to date with them. All files of a set are used
// together or not at all, so a certificate is never used with the key of another one. New files
// that cannot be used leave the old ones in force. [Files.Get] reads the files, and callers call it
// whenever they need the result, and at least every few seconds, so that a bad file is reported
// before it is needed. [Watch] calls a function when one file has changed.
package filewatch

import (
	"bytes"
	"crypto/sha256"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"sync"
	"time"
)

const (
	// settle is the age from which on a file is read: a file that is being written in place may be
	// incomplete and still be valid. A file that is renamed into place is mostly older.
	settle = 250 * time.Millisecond
	// maxSize limits the bytes of a file.
	maxSize = 16 << 20
	// attempts limits how often files are read again because they were replaced meanwhile.
	attempts = 5
)

// Config names the files.
type Config struct {
	Paths  []string     // empty ones are ignored
	What   string       // names the set in the log
	Logger *slog.Logger // for files that are reloaded or cannot be used
}

// Contents are the bytes of files, by path. They are valid until load returns.
type Contents map[string][]byte

// Files holds what load made of files. It is safe for concurrent use.
type Files[T any] struct {
	cfg  Config
	load func(Contents) (T, error)
	now  func() time.Time

	mu     sync.Mutex
	value  T
	digest [sha256.Size]byte // digest of what value was made of
	// digest or error of files that cannot be used; "" if the newest files are in force
	refused string
	problem error // why
}

// New reads the files for the first time. load does not keep the contents. It is called under a
// lock: it uses the contents and neither the network nor these Files.
func New[T any](cfg Config, load func(Contents) (T, error)) (*Files[T], error) {
	f := &Files[T]{cfg: cfg, load: load, now: time.Now}
	c, err := f.read()
	if err != nil {
		return nil, err
	}
	defer c.clear()
	f.digest = c.digest(cfg.Paths)
	if f.value, err = load(c); err != nil {
		return nil, err
	}
	return f, nil
}

// Get returns what was made of the files as they are now, or of the last ones that could be used.
func (f *Files[T]) Get() T {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.unsettled() {
		return f.value
	}
	c, err := f.read()
	if errors.Is(err, errMoving) {
		return f.value // the next call sees them
	}
	if err != nil {
		f.refuse(err.Error(), err)
		return f.value
	}
	defer c.clear()
	digest := c.digest(f.cfg.Paths)
	if digest == f.digest {
		if f.refused != "" {
			f.cfg.Logger.Info("the files in use are back", "for", f.cfg.What)
		}
		f.refused, f.problem = "", nil
		return f.value
	}
	if f.refused == string(digest[:]) {
		return f.value
	}
	value, err := f.load(c)
	if err != nil {
		f.refuse(string(digest[:]), err)
		return f.value
	}
	f.value, f.digest, f.refused, f.problem = value, digest, "", nil
	f.cfg.Logger.Info("files reloaded", "for", f.cfg.What)
	return value
}

// refuse notes files that cannot be used, and logs them once. mu is held.
func (f *Files[T]) refuse(id string, err error) {
	if f.refused != id {
		f.cfg.Logger.Error("changed files cannot be used; the old ones stay in use", "for", f.cfg.What, "error", err)
	}
	f.refused, f.problem = id, err
}

// Problem returns why the newest files are not in use, or nil if they are, as the last Get found.
func (f *Files[T]) Problem() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.problem
}

// What is Config.What.
func (f *Files[T]) What() string { return f.cfg.What }

// unsettled reports whether one of the files was written less than settle ago. A time ahead of the
// clock says nothing.
func (f *Files[T]) unsettled() bool {
	now := f.now()
	for _, p := range f.cfg.Paths {
		if info, err := os.Stat(p); p != "" && err == nil {
			if age := now.Sub(info.ModTime()); age >= 0 && age < settle {
				return true
			}
		}
	}
	return false
}

// errMoving says that files were replaced at every attempt to read them.
var errMoving = errors.New("the files are being replaced")

// read reads all files as they are at one moment.
func (f *Files[T]) read() (Contents, error) {
	for range attempts {
		before, err := f.infos()
		if err != nil {
			return nil, err
		}
		c := make(Contents, len(f.cfg.Paths))
		for _, p := range f.cfg.Paths {
			if p == "" {
				continue
			}
			if c[p], err = readFile(p); err != nil {
				c.clear()
				return nil, err
			}
		}
		after, err := f.infos()
		if err == nil && sameFiles(before, after) {
			return c, nil
		}
		c.clear()
	}
	return nil, errMoving
}

func (f *Files[T]) infos() ([]fs.FileInfo, error) {
	var infos []fs.FileInfo
	for _, p := range f.cfg.Paths {
		if p == "" {
			continue
		}
		info, err := os.Stat(p)
		if err != nil {
			return nil, err //nolint:wrapcheck // it names the file
		}
		if !info.Mode().IsRegular() { // a pipe would block
			return nil, fmt.Errorf("%s is not a regular file", p)
		}
		infos = append(infos, info)
	}
	return infos, nil
}

func sameFiles(a, b []fs.FileInfo) bool {
	for i := range a {
		if !os.SameFile(a[i], b[i]) || !a[i].ModTime().Equal(b[i].ModTime()) || a[i].Size() != b[i].Size() {
			return false
		}
	}
	return true
}

func readFile(path string) ([]byte, error) {
	file, err := os.Open(path) //nolint:gosec // the operator names the file
	if err != nil {
		return nil, err //nolint:wrapcheck // it names the file
	}
	defer func() { _ = file.Close() }() // it was only read
	data, err := io.ReadAll(io.LimitReader(file, maxSize+1))
	if err != nil {
		return nil, err //nolint:wrapcheck // it names the file
	}
	if len(data) > maxSize {
		return nil, fmt.Errorf("%s is larger than %d MiB", path, maxSize>>20)
	}
	return data, nil
}

// digest identifies the contents of paths, in their order.
func (c Contents) digest(paths []string) [sha256.Size]byte {
	h := sha256.New()
	for _, p := range paths {
		fmt.Fprintf(h, "%d ", len(c[p]))
		_, _ = h.Write(c[p]) // it never fails
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// clear overwrites the contents, which may be keys.
func (c Contents) clear() {
	for _, data := range c {
		clear(data)
	}
}

// CompletePEM returns an error if data begins a PEM block that it does not end: decoders skip such
// a block, and a half-written file would be taken for one with fewer certificates.
func CompletePEM(path string, data []byte) error {
	for {
		block, rest := pem.Decode(data)
		if block == nil {
			break
		}
		data = rest
	}
	if bytes.Contains(data, []byte("-----BEGIN")) {
		return fmt.Errorf("%s: it ends within a PEM block, or one is damaged", path)
	}
	return nil
}
