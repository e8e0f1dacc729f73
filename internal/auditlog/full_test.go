package auditlog

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
)

// onDevice makes l write to /dev/full, where every write fails as on a full disk, and returns what
// puts its own file back.
func onDevice(t *testing.T, l *Log) (back func()) {
	t.Helper()
	f, err := os.OpenFile("/dev/full", os.O_RDWR, 0)
	if errors.Is(err, fs.ErrNotExist) {
		t.Skip("this system has no /dev/full")
	}
	if err != nil {
		t.Fatal(err)
	}
	info, err := f.Stat()
	if err != nil {
		t.Fatal(err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	path, file, own := l.cfg.Path, l.f, l.info
	l.cfg.Path, l.f, l.info = "/dev/full", f, info
	return func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.cfg.Path, l.f, l.info = path, file, own
		_ = f.Close()
	}
}

func TestFullDevice(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a")
	var logged bytes.Buffer
	l := open(t, Config{Path: path, Logger: slog.New(slog.NewTextHandler(&logged, nil))})
	l.Record(call(0))
	back := onDevice(t, l)
	for i := range 5 {
		l.Record(call(1 + i))
	}
	if err := l.Check(); !errors.Is(err, syscall.ENOSPC) || l.Lost() != 5 {
		t.Errorf("%v, %d lost; want ENOSPC, 5", err, l.Lost())
	}
	if n := strings.Count(logged.String(), "records are lost"); n != 1 {
		t.Errorf("the outage is logged %d times:\n%s", n, &logged)
	}
	back()
	// Check alone recovers, so that a process that waits for it needs no record to write.
	if err := l.Check(); err != nil || l.Lost() != 5 {
		t.Errorf("after: %v, %d lost", err, l.Lost())
	}
	l.Record(call(9))
	r := good(t, 3, nil, path)
	if r.Lost != 5 || len(r.Notes) != 1 || !strings.Contains(logged.String(), "written again") {
		t.Errorf("report = %+v\n%s", r, &logged)
	}
}

// TestFullDisk fills a real file system, of memory and 64 KiB, and makes room again, several times.
func TestFullDisk(t *testing.T) {
	dir := t.TempDir()
	if err := mountSmall(dir); err != nil {
		t.Skipf("a small file system can be mounted by root on Linux only (%v); TestFullDevice covers the rest", err)
	}
	t.Cleanup(func() {
		if err := unmount(dir); err != nil {
			t.Error(err)
		}
	})
	path, ballast := filepath.Join(dir, "a"), filepath.Join(dir, "ballast")
	l := open(t, Config{Path: path, MaxSize: 1 << 20})
	l.Record(call(0))
	written := 1
	for round := range 3 {
		before := l.Lost()
		overwriteUntilFull(t, ballast)
		for n := 0; l.Lost() < before+3; n++ {
			l.Record(call(n))
			if n > 10_000 {
				t.Fatal("the disk does not fill up")
			}
			written++
		}
		written -= 3
		if err := l.Check(); !errors.Is(err, syscall.ENOSPC) {
			t.Fatalf("round %d: %v, want ENOSPC", round, err)
		}
		// What stands there is whole all the time.
		if r := verify(t, nil, path); !r.OK {
			t.Fatalf("round %d: %+v", round, r.Findings)
		}
		if err := os.Remove(ballast); err != nil {
			t.Fatal(err)
		}
		l.Record(call(0))
		written += 2 // with the one that says what was lost
		if err := l.Check(); err != nil {
			t.Fatal(err)
		}
	}
	if r := good(t, written, nil, path); r.Lost != 9 {
		t.Errorf("%d lost, want 9", r.Lost)
	}
}

func overwriteUntilFull(t *testing.T, path string) {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for {
		if _, err := f.Write(make([]byte, 4096)); errors.Is(err, syscall.ENOSPC) {
			return
		} else if err != nil {
			t.Fatal(err)
		}
	}
}

// TestPartOfARecord: a write that fails half-way is taken back, or closed where the file cannot be
// cut.
func TestPartOfARecord(t *testing.T) {
	for _, left := range []string{`{"seq":2,"ti`, "whole", "\n{"} {
		t.Run(left, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "a")
			l := open(t, Config{Path: path})
			l.Record(call(0))
			text := left
			if left == "whole" {
				e := newEntry(call(1))
				whole, _, err := l.encode(&e)
				if err != nil {
					t.Fatal(err)
				}
				text = strings.TrimSuffix(string(whole), "\n")
			}
			l.mu.Lock()
			if _, err := l.f.WriteString(text); err != nil {
				t.Fatal(err)
			}
			l.dirty = true
			l.mu.Unlock()
			l.countLost(syscall.ENOSPC)
			l.Record(call(2))
			good(t, 3, nil, path) // the first, what was lost, the last
		})
	}
}

// TestTakenAway: a log that is moved away, removed or replaced goes on where it should, in the same
// chain.
func TestTakenAway(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a")
	l := open(t, Config{Path: path, Key: testKey})
	l.Record(call(0))
	if err := os.Rename(path, path+".moved"); err != nil {
		t.Fatal(err)
	}
	l.Record(call(1))
	good(t, 2, testKey, path, path+".moved")
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	l.Record(call(2))
	if r := verify(t, testKey, path, path+".moved"); r.OK || r.Findings[0].Kind != KindMissing {
		t.Errorf("a removed file leaves no trace: %+v", r)
	}
	// Another file in its place is not written to.
	overwrite(t, path+".new", []byte("precious\n"))
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	l.Record(call(3))
	if l.Lost() != 1 || string(read(t, path)) != "precious\n" {
		t.Errorf("%d lost, file %q", l.Lost(), read(t, path))
	}
	older := read(t, path+".moved")
	overwrite(t, path, older)
	l.Record(call(4))
	if err := l.Check(); err == nil || !strings.Contains(err.Error(), "another log") {
		t.Errorf("an older state in its place: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	l.Record(call(5))
	if r := verify(t, testKey, path); !r.OK || r.Lost != 2 || r.FirstSeq != 4 || r.Records != 2 {
		t.Errorf("report = %+v", r)
	}
}

// TestRotationFails: the log goes on in its file when it cannot begin a new one.
func TestRotationFails(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a")
	l := open(t, Config{Path: path, MaxSize: 1})
	l.Record(call(0))
	l.Record(call(1))
	l.Record(call(2))
	// Names are taken: a thousand files of another chain.
	for i := range 1000 {
		name := fmt.Sprintf("%s.%012d", path, 3)
		if i > 0 {
			name = fmt.Sprintf("%s-%03d", name, i)
		}
		if err := os.Mkdir(name, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	l.Record(call(3))
	l.Record(call(4))
	if r := verify(t, nil, path); !r.OK || r.Records != 3 || l.Lost() != 0 {
		t.Errorf("report = %+v", r)
	}
}
