// Package canary searches logs, metrics, error texts and etcd's files for secrets that must not be
// there.
//
// A test gets every secret that it writes from a [Set], which adds a string that occurs nowhere
// else, or adds secrets of other origin. The set then searches files for each of them, as they are
// and in the encodings in which software usually prints bytes.
package canary

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
)

// Set is a group of secrets. It is safe for concurrent use.
type Set struct {
	name string

	mu       sync.Mutex
	patterns []pattern
	seen     map[string]bool
	marker   string
}

type pattern struct {
	secret string // what the secret is, without the secret itself
	form   string
	bytes  []byte
}

// Finding is a place where a secret was found.
type Finding struct {
	Path   string
	Offset int // of the first byte, in bytes
	Secret string
	Form   string
}

// String implements [fmt.Stringer].
func (f Finding) String() string {
	return fmt.Sprintf("%s at byte %d: %s, %s", f.Path, f.Offset, f.Secret, f.Form)
}

// New returns a set whose values all contain the same new marker. name describes the set in
// findings.
func New(name string) *Set {
	random := make([]byte, 6)
	rand.Read(random)
	s := &Set{name: name, marker: "Canary" + hex.EncodeToString(random), seen: map[string]bool{}}
	s.add("the marker of "+name, []byte(s.marker))
	return s
}

// Marker returns the string that each value of the set contains: 18 letters and digits.
func (s *Set) Marker() string { return s.marker }

// Value adds the marker to text and makes the result a secret of the set.
func (s *Set) Value(text string) string { return s.marker + "-" + text }

// Key returns 32 bytes of key material that contain the marker, different for each n.
func (s *Set) Key(n int) []byte {
	key := []byte(fmt.Sprintf("%s-key%010d", s.marker, n))
	return key[:32]
}

// Add adds a secret of other origin to the set. It ignores secrets shorter than 8 bytes, because
// they occur by chance.
func (s *Set) Add(what string, secret []byte) {
	if len(secret) < 8 {
		return
	}
	s.add(what, secret)
}

func (s *Set) add(what string, secret []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.seen[string(secret)] {
		return
	}
	s.seen[string(secret)] = true
	for _, p := range forms(secret) {
		p.secret = what
		s.patterns = append(s.patterns, p)
	}
}

// forms returns the encodings in which a secret may be printed: unchanged, escaped, hexadecimal, a
// list of numbers, and base64 at each of the three alignments that it can have inside a longer
// value.
func forms(secret []byte) []pattern {
	all := []pattern{
		{form: "in clear", bytes: bytes.Clone(secret)},
		{form: "in hexadecimal", bytes: []byte(hex.EncodeToString(secret))},
		{form: "in hexadecimal", bytes: []byte(strings.ToUpper(hex.EncodeToString(secret)))},
		{form: "as numbers", bytes: []byte(numbers(secret, " "))},
		{form: "as numbers", bytes: []byte(numbers(secret, ","))},
		{form: "as numbers", bytes: []byte(numbers(secret, ", "))},
	}
	if quoted := strings.Trim(strconv.Quote(string(secret)), `"`); quoted != string(secret) {
		all = append(all, pattern{form: "quoted", bytes: []byte(quoted)})
	}
	for _, encoding := range []*base64.Encoding{base64.StdEncoding, base64.URLEncoding} {
		for shift := range 3 {
			all = append(all, pattern{form: "in base64", bytes: aligned(encoding, secret, shift)})
		}
	}
	return all
}

// aligned returns the base64 characters that depend only on secret when shift bytes precede it.
func aligned(encoding *base64.Encoding, secret []byte, shift int) []byte {
	text := encoding.WithPadding(base64.NoPadding).EncodeToString(append(make([]byte, shift), secret...))
	first := (shift*8 + 5) / 6
	last := (shift + len(secret)) * 8 / 6
	return []byte(text[first:last])
}

func numbers(secret []byte, separator string) string {
	list := make([]string, len(secret))
	for i, b := range secret {
		list[i] = strconv.Itoa(int(b))
	}
	return strings.Join(list, separator)
}

// Search returns the secrets found in data, with at most one finding per pattern. path is used only
// in findings.
func (s *Set) Search(path string, data []byte) []Finding {
	s.mu.Lock()
	patterns := s.patterns
	s.mu.Unlock()
	var found []Finding
	for _, p := range patterns {
		if at := bytes.Index(data, p.bytes); at >= 0 {
			found = append(found, Finding{Path: path, Offset: at, Secret: p.secret, Form: p.form})
		}
	}
	return found
}

// Files searches the named regular files, and all files below the named folders. It skips files
// that disappear in the meantime.
func (s *Set) Files(paths ...string) ([]Finding, error) {
	var found []Finding
	for _, root := range paths {
		err := filepath.WalkDir(root, func(path string, entry fs.DirEntry, err error) error {
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil || !entry.Type().IsRegular() {
				return err
			}
			data, err := os.ReadFile(path)
			if errors.Is(err, fs.ErrNotExist) {
				return nil
			}
			if err != nil {
				return err
			}
			found = append(found, s.Search(path, data)...)
			return nil
		})
		if err != nil {
			return found, fmt.Errorf("search %s: %w", root, err)
		}
	}
	return found, nil
}
