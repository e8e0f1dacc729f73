package unixsocket

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
)

// shortDir is a folder whose path leaves room for a socket's name.
func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "kms")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// stale leaves a socket at path that nobody answers on, as a process that was killed does.
func stale(t *testing.T, path string) {
	t.Helper()
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
}

// only fails the test unless the folder holds just these names.
func only(t *testing.T, dir string, names ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var have []string
	for _, e := range entries {
		have = append(have, e.Name())
	}
	if strings.Join(have, " ") != strings.Join(names, " ") {
		t.Errorf("the folder holds %q, want %q", have, names)
	}
}

func TestListen(t *testing.T) {
	for _, mode := range []fs.FileMode{0o600, 0o660, 0o666} {
		for name, before := range map[string]func(*testing.T, string){"new": func(*testing.T, string) {}, "stale": stale} {
			t.Run(fmt.Sprintf("%s %o", name, mode), func(t *testing.T) {
				dir := shortDir(t)
				path := filepath.Join(dir, "kms.sock")
				before(t, path)
				l, err := Listen(path, mode)
				if err != nil {
					t.Fatal(err)
				}
				only(t, dir, "kms.sock")
				if info, err := os.Lstat(path); err != nil || info.Mode() != fs.ModeSocket|mode {
					t.Errorf("mode %v, %v; want a socket with %o", info.Mode(), err, mode)
				}
				if l.Addr().String() != path {
					t.Errorf("address %v", l.Addr())
				}
				conn, err := net.Dial("unix", path)
				if err != nil {
					t.Fatal(err)
				}
				conn.Close()
				l.Close()
				only(t, dir)
				l.Close() // once more does no harm
			})
		}
	}
}

// TestListenRefuses leaves what is there as it is, and says what to do.
func TestListenRefuses(t *testing.T) {
	write := func(t *testing.T, path string) {
		if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, tc := range map[string]struct {
		before func(*testing.T, string)
		want   string
	}{
		"a file":        {write, "not a socket"},
		"an empty file": {func(t *testing.T, path string) { os.WriteFile(path, nil, 0o600) }, "not a socket"},
		"a folder":      {func(_ *testing.T, path string) { os.Mkdir(path, 0o700) }, "not a socket"},
		"a link to a socket": {func(t *testing.T, path string) {
			stale(t, path+".real")
			os.Symlink(path+".real", path)
		}, "not a socket"},
		"a dangling link": {func(_ *testing.T, path string) { os.Symlink(path+".gone", path) }, "not a socket"},
		"a server": {func(t *testing.T, path string) {
			l, err := Listen(path, 0o600)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		}, ErrInUse.Error()},
		"no folder": {func(t *testing.T, path string) { os.Remove(filepath.Dir(path)) }, "does not exist"},
		"a file for a folder": {func(t *testing.T, path string) {
			os.Remove(filepath.Dir(path))
			write(t, filepath.Dir(path))
		}, "not a directory"},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(shortDir(t), "kms.sock")
			tc.before(t, path)
			before, _ := os.Lstat(path)
			l, err := Listen(path, 0o600)
			if err == nil {
				l.Close()
				t.Fatal("listens")
			}
			if !strings.Contains(err.Error(), tc.want) || !strings.Contains(err.Error(), path) {
				t.Errorf("got %v, want it to name %q and %q", err, path, tc.want)
			}
			if after, _ := os.Lstat(path); before != nil && (after == nil || !os.SameFile(before, after) || after.ModTime() != before.ModTime()) {
				t.Error("what was there was changed")
			}
		})
	}
}

func TestRelative(t *testing.T) {
	for _, path := range []string{"", "kms.sock", "./kms.sock", "@kms"} {
		if l, err := Listen(path, 0o600); err == nil {
			l.Close()
			t.Errorf("listens on %q", path)
		}
	}
}

// TestListenTogether: of many that start in one instant over a stale socket, one gets it, and
// clients reach that one.
func TestListenTogether(t *testing.T) {
	for range 20 {
		dir := shortDir(t)
		path := filepath.Join(dir, "kms.sock")
		stale(t, path)
		var got atomic.Pointer[net.Listener]
		var all sync.WaitGroup
		begin := make(chan struct{})
		for range 8 {
			all.Go(func() {
				<-begin
				l, err := Listen(path, 0o600)
				switch {
				case err == nil:
					if !got.CompareAndSwap(nil, &l) {
						t.Error("two listen")
						l.Close()
					}
				case !errors.Is(err, ErrInUse):
					t.Errorf("got %v, want ErrInUse", err)
				}
			})
		}
		close(begin)
		all.Wait()
		if got.Load() == nil {
			t.Fatal("none listens")
		}
		l := *got.Load()
		conn, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		if accepted, err := l.Accept(); err != nil {
			t.Error(err)
		} else {
			accepted.Close()
		}
		conn.Close()
		l.Close()
		only(t, dir)
	}
}

// TestSuccessor keeps the socket of a process that came after ours lost its own.
func TestSuccessor(t *testing.T) {
	dir := shortDir(t)
	path := filepath.Join(dir, "kms.sock")
	first, err := Listen(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	os.Remove(path)
	second, err := Listen(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	first.Close()
	only(t, dir, "kms.sock")
	conn, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
	second.Close()
	only(t, dir)
}

// TestFolderGone closes a listener whose folder was removed.
func TestFolderGone(t *testing.T) {
	dir := shortDir(t)
	l, err := Listen(filepath.Join(dir, "kms.sock"), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	os.RemoveAll(dir)
	if err := l.Close(); err != nil {
		t.Error(err)
	}
}

// TestNeverOpen watches the folder while sockets come and go: whatever the process' mask is, a
// stranger finds nothing to connect to.
func TestNeverOpen(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	dir := shortDir(t)
	path := filepath.Join(dir, "kms.sock")
	stop := make(chan struct{})
	var watch sync.WaitGroup
	seen := 0
	watch.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			entries, _ := os.ReadDir(dir)
			for _, e := range entries {
				// What is gone again is no one's to open.
				if info, err := os.Lstat(filepath.Join(dir, e.Name())); err == nil {
					seen++
					if info.Mode().Perm()&0o077 != 0 {
						t.Errorf("%s has mode %v", e.Name(), info.Mode())
						return
					}
				}
			}
		}
	})
	for range 300 {
		l, err := Listen(path, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		l.Close()
	}
	close(stop)
	watch.Wait()
	if seen == 0 {
		t.Error("the watch saw nothing")
	}
}
