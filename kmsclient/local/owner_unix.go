//go:build unix

package local

import (
	"io/fs"
	"os"
	"syscall"
)

// keepOwner gives path the owner and group that the file of info has.
func keepOwner(path string, info fs.FileInfo) error {
	old, ok := info.Sys().(*syscall.Stat_t)
	if !ok {
		return nil
	}
	now, err := os.Stat(path)
	if err != nil {
		return err
	}
	if s, ok := now.Sys().(*syscall.Stat_t); ok && s.Uid == old.Uid && s.Gid == old.Gid {
		return nil
	}
	return os.Chown(path, int(old.Uid), int(old.Gid))
}
