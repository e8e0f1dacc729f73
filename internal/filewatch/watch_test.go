package filewatch

import (
	"context"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"
)

// TestWatch: a change is found once, in the file itself, of a file that is renamed into its place,
// and behind a link whose target is in another folder; also if the file is missing for a moment.
func TestWatch(t *testing.T) {
	path, target := filepath.Join(t.TempDir(), "file"), filepath.Join(t.TempDir(), "target")
	write := func(path, text string) {
		t.Helper()
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	write(target, "a")
	must(os.Symlink(target, path))
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	defer all.Wait()
	defer stop()
	changed, seen := make(chan struct{}, 16), Digest(path)
	all.Go(func() { Watch(ctx, path, seen, func() { changed <- struct{}{} }) })
	for _, c := range []struct {
		name   string
		change func()
	}{
		{"behind the link", func() { write(target, "b") }},
		{"renamed", func() { write(path+".new", "c"); must(os.Rename(path+".new", path)) }},
		{"in place", func() { must(os.Remove(path)); write(path, "d") }},
	} {
		c.change()
		select {
		case <-changed:
		case <-time.After(20 * time.Second):
			t.Fatalf("%s: the change is not found", c.name)
		}
		if len(changed) > 0 {
			t.Errorf("%s: the change counts twice", c.name)
		}
	}
}
