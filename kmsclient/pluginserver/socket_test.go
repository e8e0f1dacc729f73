package pluginserver

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

// TestListen: each form of the path gives a socket of the process' own user, and one that another
// server has stays as it is.
func TestListen(t *testing.T) {
	for _, form := range []string{"", "unix://"} {
		path := filepath.Join(kmstest.SocketDir(t), "kms.sock")
		l, err := Listen(form + path)
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		if info, err := os.Lstat(path); err != nil || info.Mode() != fs.ModeSocket|0o600 {
			t.Errorf("%smode %v, %v; want a socket with 0600", form, info.Mode(), err)
		}
		if l, err := Listen(form + path); !errors.Is(err, ErrInUse) {
			l.Close()
			t.Errorf("%s: %v", form, err)
		}
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
