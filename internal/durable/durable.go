// Package durable writes files that are complete and in place after a crash.
package durable

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
)

// Write replaces the file at path by one with this content and mode: a reader finds the old file or
// the new one. The name of the temporary file in the same folder begins with a dot.
func Write(path string, data []byte, mode fs.FileMode) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+"-*")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	err = errors.Join(err, f.Chmod(mode), f.Sync(), f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(f.Name()))
	}
	return SyncFolder(filepath.Dir(path))
}

// SyncFolder makes the names of the files in a folder last.
func SyncFolder(dir string) error {
	d, err := os.Open(dir) //nolint:gosec // the operator names the files in it
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
