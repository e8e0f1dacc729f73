// Package canary finds secrets where none may be: in logs, metrics, error texts and etcd's files.
//
// A test takes every secret it writes from a [Set], which marks it with a string that occurs nowhere else, or adds secrets that
// something else made. The set then searches files for each of them, in clear and in the forms in which software likes to print bytes.
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
	secret string // what it is, without the secret itself
	form   string
	bytes  []byte
}

// Finding is a place where a secret stands.
type Finding struct {
	Path   string
	Offset int // of the first byte, in bytes
	Secret string
	Form   string
}

func (f Finding) String() string {
	return fmt.Sprintf("%s at byte %d: %s, %s", f.Path, f.Offset, f.Secret, f.Form)
}

// New makes a set whose values all carry one fresh marker. name describes the set in findings.
func New(name string) *Set {
	random := make([]byte, 6)
	rand.Read(random)
	s := &Set{name: name, marker: "Canary" + hex.EncodeToString(random), seen: map[string]bool{}}
	s.add("the marker of "+name, []byte(s.marker))
	return s
}

// Marker is the string that each value of the set holds: 18 letters and digits.
func (s *Set) Marker() string { return s.marker }

// Value marks text as a secret of the set.
func (s *Set) Value(text string) string { return s.marker + "-" + text }

// Key returns 32 bytes of key material that hold the marker, different for each n.
func (s *Set) Key(n int) []byte {
	key := []byte(fmt.Sprintf("%s-key%010d", s.marker, n))
	return key[:32]
}

// Add puts a secret that something else made into the set. Secrets shorter than 8 bytes are ignored, for they occur by chance.
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

// forms lists the ways in which a secret may be printed: as it is, escaped, in hexadecimal, as a list of numbers, in base64 at each of the three
// alignments it can have inside a longer value.
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

// aligned returns the characters of base64 that depend on secret alone when shift bytes stand before it.
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

// Search returns the secrets found in data, at most one finding for each pattern. path is only named in findings.
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

// Files searches each regular file named, and each one below a folder named. Files that vanish meanwhile are left out.
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
