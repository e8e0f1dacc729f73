//go:build darwin || dragonfly || freebsd || linux || netbsd || openbsd

package unixsocket

import (
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"
)

// lockDir locks a folder against other processes that place a socket in it, without leaving a file.
// The lock is held while a socket is placed. A process that holds it for longer than a few probes
// is not a server of this kind, and the result is an error.
func lockDir(dir string) (unlock func(), err error) {
	f, err := os.Open(dir) //nolint:gosec // the operator names the folder
	if err != nil {
		return nil, fmt.Errorf("open its folder: %w", err)
	}
	for deadline := time.Now().Add(5 * probeTimeout); ; time.Sleep(5 * time.Millisecond) {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return func() { _ = f.Close() }, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) || time.Now().After(deadline) {
			_ = f.Close()
			return nil, fmt.Errorf("lock its folder: %w", err)
		}
	}
}
