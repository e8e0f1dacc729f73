package pluginserver

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
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
	for _, form := range []string{"", "unix://"} {
		for name, before := range map[string]func(*testing.T, string){"new": func(*testing.T, string) {}, "stale": stale} {
			t.Run(form+name, func(t *testing.T) {
				dir := shortDir(t)
				path := filepath.Join(dir, "kms.sock")
				before(t, path)
				l, err := Listen(form + path)
				if err != nil {
					t.Fatal(err)
				}
				only(t, dir, "kms.sock")
				if info, err := os.Lstat(path); err != nil || info.Mode() != fs.ModeSocket|0o600 {
					t.Errorf("mode %v, %v; want a socket with 0600", info.Mode(), err)
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

// TestListenInUse: a socket that another server has stays as it is.
func TestListenInUse(t *testing.T) {
	path := filepath.Join(shortDir(t), "kms.sock")
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if l, err := Listen(path); !errors.Is(err, ErrInUse) {
		l.Close()
		t.Errorf("%v", err)
	}
}

func TestBadSockets(t *testing.T) {
	for _, socket := range []string{
		"", "kms.sock", "unix:", "unix://", "unix:///", "/", "unix://kms.sock", "unix:/tmp/kms.sock", "tcp://127.0.0.1:1", "@kms", "unix:///@kms", "/@kms",
		"/tmp/k%20s", "unix:///tmp/k?s", "/tmp/k#s", "/tmp/k\x00s", "/tmp//kms.sock", "/tmp/kms.sock/", "/tmp/../kms.sock", "/" + strings.Repeat("k", 200),
	} {
		if l, err := Listen(socket); err == nil {
			l.Close()
			t.Errorf("listens on %q", socket)
		}
	}
}
