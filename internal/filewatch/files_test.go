package filewatch

import (
	"bytes"
	"encoding/pem"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// place is how a pair of files is replaced.
type place struct {
	cert, key string
	put       func(t *testing.T, cert, key string)
}

func write(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

func rename(t *testing.T, path, text string) {
	t.Helper()
	write(t, path+".new", text)
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}

// places are all ways in which files change: rewritten in place, replaced by a rename, or by one
// link of a folder that both are in, as Kubernetes does.
func places(t *testing.T) map[string]place {
	t.Helper()
	pair := func(put func(*testing.T, string, string)) place {
		dir := t.TempDir()
		cert, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
		return place{cert, key, func(t *testing.T, c, k string) { put(t, cert, c); put(t, key, k) }}
	}
	mount := t.TempDir()
	versions := 0
	data := place{filepath.Join(mount, "tls.crt"), filepath.Join(mount, "tls.key"), func(t *testing.T, cert, key string) {
		versions++
		folder := "..version" + strconv.Itoa(versions)
		if err := os.Mkdir(filepath.Join(mount, folder), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(mount, folder, "tls.crt"), cert)
		write(t, filepath.Join(mount, folder, "tls.key"), key)
		link := filepath.Join(mount, "..data")
		if err := os.Symlink(folder, link+".new"); err != nil {
			t.Fatal(err)
		}
		if err := os.Rename(link+".new", link); err != nil {
			t.Fatal(err)
		}
	}}
	for _, name := range []string{"tls.crt", "tls.key"} {
		if err := os.Symlink(filepath.Join("..data", name), filepath.Join(mount, name)); err != nil {
			t.Fatal(err)
		}
	}
	return map[string]place{"in place": pair(write), "renamed": pair(rename), "..data": data}
}

// TestFiles takes every way of replacing files through all that can happen to them.
func TestFiles(t *testing.T) {
	for name, p := range places(t) {
		t.Run(name, func(t *testing.T) {
			var log bytes.Buffer
			p.put(t, "1", "1")
			f, err := New(Config{Paths: []string{p.cert, "", p.key}, What: "a test", Logger: slog.New(slog.NewTextHandler(&log, nil))}, func(c Contents) (string, error) {
				cert, key := string(c[p.cert]), string(c[p.key])
				if cert != key {
					return "", errors.New("the key is not the certificate's")
				}
				return cert, nil
			})
			if err != nil {
				t.Fatal(err)
			}
			clock := time.Now()
			f.now = func() time.Time { return clock }
			step := func(what, want, problem string, lines int, logged string) {
				t.Helper()
				log.Reset()
				clock = time.Now().Add(settle)
				for range 3 { // it is logged once
					if got := f.Get(); got != want {
						t.Errorf("%s: %q, want %q", what, got, want)
					}
				}
				err := f.Problem()
				if (err == nil) != (problem == "") || err != nil && !strings.Contains(err.Error(), problem) {
					t.Errorf("%s: problem %v, want %q", what, err, problem)
				}
				if got := strings.Count(log.String(), "\n"); got != lines || !strings.Contains(log.String(), logged) {
					t.Errorf("%s: %d lines, want %d with %q\n%s", what, got, lines, logged, &log)
				}
			}
			step("unchanged", "1", "", 0, "")
			p.put(t, "2", "2")
			clock = time.Now()
			if got := f.Get(); name != "..data" && got != "1" {
				t.Errorf("just written: %q", got)
			}
			step("replaced", "2", "", 1, "files reloaded")
			p.put(t, "3", "2")
			step("mismatched", "2", "not the certificate's", 1, "cannot be used")
			p.put(t, "3", "3")
			step("good again", "3", "", 1, "files reloaded")
			p.put(t, "", "3")
			step("half written", "3", "not the certificate's", 1, "cannot be used")
			p.put(t, "3", "3")
			step("as before", "3", "", 1, "are back")
			at, err := os.Stat(p.cert)
			if err != nil {
				t.Fatal(err)
			}
			p.put(t, "4", "4") // of the same size
			for _, path := range []string{p.cert, p.key} {
				if err := os.Chtimes(path, at.ModTime(), at.ModTime()); err != nil {
					t.Fatal(err)
				}
			}
			step("with the old time and size", "4", "", 1, "files reloaded")
			if err := os.Remove(p.key); err != nil {
				t.Fatal(err)
			}
			step("missing", "4", "no such file", 1, "cannot be used")
			if name == "..data" {
				if err := os.Symlink(filepath.Join("..data", "tls.key"), p.key); err != nil {
					t.Fatal(err)
				}
			}
			p.put(t, "5", "5")
			step("there again", "5", "", 1, "files reloaded")
		})
	}
}

// TestReplacedWhileRead: files that are replaced between two reads are not taken as one set.
func TestReplacedWhileRead(t *testing.T) {
	p := places(t)["..data"]
	p.put(t, "0", "0")
	f, err := New(Config{Paths: []string{p.cert, p.key}, Logger: slog.New(slog.DiscardHandler)}, func(c Contents) (string, error) {
		if !bytes.Equal(c[p.cert], c[p.key]) {
			t.Error("files of two versions")
		}
		return string(c[p.cert]), nil
	})
	if err != nil {
		t.Fatal(err)
	}
	f.now = func() time.Time { return time.Now().Add(settle) }
	stop, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for {
			select {
			case <-stop:
				return
			default:
				f.Get()
			}
		}
	}()
	for i := range 500 {
		text := strings.Repeat("x", i%7+1)
		p.put(t, text, text)
	}
	close(stop)
	<-done
}

func TestCompletePEM(t *testing.T) {
	block := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: bytes.Repeat([]byte("certificate"), 20)})
	two := append(bytes.Clone(block), block...)
	for _, good := range [][]byte{nil, block, two, append([]byte("# a comment\n"), two...), append(bytes.Clone(two), "\n\n"...)} {
		if err := CompletePEM("ca.crt", good); err != nil {
			t.Errorf("%q: %v", good, err)
		}
	}
	for n := len(block) + len("-----BEGIN"); n < len(two)-1; n++ {
		if err := CompletePEM("ca.crt", two[:n]); err == nil {
			t.Errorf("the first %d of %d bytes pass", n, len(two))
		}
	}
}

// TestNew: what is wrong at the start is an error.
func TestNew(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a")
	whole := func(c Contents) (int, error) { return len(c[path]), nil }
	if _, err := New(Config{Paths: []string{path}}, whole); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	if _, err := New(Config{Paths: []string{dir}}, whole); err == nil {
		t.Error("a folder passes")
	}
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(f.Truncate(maxSize+1), f.Close()); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{Paths: []string{path}}, whole); err == nil || !strings.Contains(err.Error(), "larger") {
		t.Errorf("too large: %v", err)
	}
}
