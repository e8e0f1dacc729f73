package cli

import (
	"context"
	"crypto/sha256"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// settle is how long a file's folder must have been left alone before a change counts: editors
	// write in steps.
	settle = 250 * time.Millisecond
	// unsettled is how long it is waited for that, in a folder that something writes to all the
	// time.
	unsettled = 2 * time.Second
)

// watchFile calls changed each time that the file's content is another than seen or than it was at
// the last call, until ctx ends. It watches the folder, since editors and Kubernetes' mounts put a
// new file, or a new link, in the place of the old one. unwatched is what the log says if that is
// not possible.
func watchFile(ctx context.Context, path string, seen [sha256.Size]byte, log *slog.Logger, unwatched string, changed func()) {
	w, err := fsnotify.NewWatcher()
	if err == nil {
		defer func() { _ = w.Close() }() // nothing is left to do if it fails
		err = w.Add(filepath.Dir(path))
	}
	if err != nil {
		log.Warn(unwatched, "file", path, "error", err)
		return
	}
	quiet := time.NewTimer(settle) // the first look is for what changed before the watch began
	defer quiet.Stop()
	first := time.Now() // of the events since the last look
	waiting := true
	noted := func() {
		if !waiting {
			first, waiting = time.Now(), true
		}
		if time.Since(first) < unsettled {
			quiet.Reset(settle)
		}
	}
	for {
		select {
		case <-ctx.Done():
			return
		case _, ok := <-w.Events:
			if !ok {
				return
			}
			noted()
		case err, ok := <-w.Errors:
			if !ok {
				return
			}
			// Events may have been lost.
			log.Debug("watching a file", "file", path, "error", err)
			noted()
		case <-quiet.C:
			waiting = false
			if now := digest(path); now != seen {
				seen = now
				changed()
			}
		}
	}
}

// digest identifies a file's content. A file that cannot be read has the zero digest.
func digest(path string) [sha256.Size]byte {
	data, err := os.ReadFile(path) //nolint:gosec // the operator names the file
	if err != nil {
		return [sha256.Size]byte{}
	}
	defer clear(data) // it may hold keys
	return sha256.Sum256(data)
}
