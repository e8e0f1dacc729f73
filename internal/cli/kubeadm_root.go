//go:build unix

package cli

import (
	"os"
	"syscall"
)

// changeRoot makes dir the root folder of this process.
func changeRoot(dir string) error {
	if err := syscall.Chroot(dir); err != nil {
		return err
	}
	return os.Chdir("/")
}
