package cli

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"syscall"
	"testing"
	"time"
)

// TestNewVersionOfAKeyFile: it is used at once when the file changes, and, where the change is not
// seen, since it is behind a link to another folder, with SIGHUP; also when the configuration
// cannot be reloaded then.
func TestNewVersionOfAKeyFile(t *testing.T) {
	for name, c := range map[string]struct{ linked, broken bool }{"changed file": {}, "SIGHUP": {linked: true}, "SIGHUP with a broken configuration": {linked: true, broken: true}} {
		t.Run(name, func(t *testing.T) {
			d, elsewhere := newDir(t), newDir(t)
			file := d.path("key.yaml")
			if c.linked {
				file = elsewhere.path("key.yaml")
				if err := os.Remove(d.path("key.yaml")); err != nil {
					t.Fatal(err)
				}
				if err := os.Symlink(file, d.path("key.yaml")); err != nil {
					t.Fatal(err)
				}
			}
			path := d.config(t)
			s := start(t, path)
			s.logged(`"msg":"DEK seed generated","provider":"dev","keyID":"1"`)
			s.logged(`"msg":"KMS key is usable"`)
			execute(t, "kms", "new-local-key", file).want(t, 0)
			if c.broken {
				d.config(t, "kind: ProxyConfiguration", "kind: Something")
			}
			if c.linked {
				s.signal(syscall.SIGHUP)
			}
			s.logged(`"msg":"DEK seed generated","provider":"dev","keyID":"2"`)
			s.signal(syscall.SIGTERM)
			s.exited(0)
		})
	}
}

// TestWatchInABusyFolder: something writes beside the file all the time, and a change is noticed
// all the same.
func TestWatchInABusyFolder(t *testing.T) {
	d := dir(t.TempDir())
	if err := os.WriteFile(d.path("file"), []byte("a"), 0o600); err != nil {
		t.Fatal(err)
	}
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	defer all.Wait()
	defer stop()
	changed, seen := make(chan struct{}, 16), digest(d.path("file"))
	all.Go(func() {
		watchFile(ctx, d.path("file"), seen, slog.New(slog.DiscardHandler), "not watched", func() { changed <- struct{}{} })
	})
	all.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			_ = os.WriteFile(d.path("beside"), []byte(fmt.Sprint(i)), 0o600)
			time.Sleep(10 * time.Millisecond)
		}
	})
	for _, text := range []string{"b", "c"} {
		if err := os.WriteFile(d.path("file"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		select {
		case <-changed:
		case <-time.After(deadline):
			t.Fatal("the change is not noticed")
		}
	}
}
