package kubeadm

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/rogpeppe/go-internal/diff"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/durable"
)

// Change creates, replaces or removes one file.
type Change struct {
	Path string
	Old  []byte // nil if the file did not exist
	New  []byte // nil to remove the file
}

// change returns the change that writes text to the file at path, or removes it if text is nil.
func change(path string, text []byte) (Change, error) {
	old, err := os.ReadFile(path) //nolint:gosec // one of the files in Paths
	if errors.Is(err, fs.ErrNotExist) {
		old, err = nil, nil
	}
	return Change{path, old, text}, err
}

// Empty reports whether the file already has its new content.
func (c *Change) Empty() bool { return (c.Old == nil) == (c.New == nil) && bytes.Equal(c.Old, c.New) }

func (c *Change) write() error   { return writeFile(c.Path, c.New) }
func (c *Change) restore() error { return writeFile(c.Path, c.Old) }

// writeFile writes text to the file at path, atomically, or removes it if text is nil. A new file
// has mode 0600. kubelet ignores the temporary file in its folder of manifests, whose name begins
// with a dot.
func writeFile(path string, text []byte) error {
	if text == nil {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		return durable.SyncFolder(filepath.Dir(path))
	}
	mode := fs.FileMode(0o600)
	if info, err := os.Stat(path); err == nil {
		mode = info.Mode().Perm()
	}
	if err := durable.Write(path, text, mode); err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// Diff returns the change as a unified diff, "" if it is empty.
func (c *Change) Diff() string {
	if c.Empty() {
		return ""
	}
	from, to := c.Path, c.Path
	if c.Old == nil {
		from = "/dev/null"
	}
	if c.New == nil {
		to = "/dev/null"
	}
	_, text, _ := strings.Cut(string(diff.Diff(from, c.Old, to, c.New)), "\n") // without the line that repeats the names
	return text
}
