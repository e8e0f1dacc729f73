package writebuffer

import (
	"errors"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// rawConn returns the socket of a connection, or nil if it has none.
func rawConn(conn net.Conn) syscall.RawConn {
	if c, ok := conn.(syscall.Conn); ok {
		if raw, err := c.SyscallConn(); err == nil {
			return raw
		}
	}
	return nil
}

// tryWrite writes as much of w.all as the system takes at once: sockets of package net do not
// block.
func (w *Buffer) tryWrite(fd uintptr) bool {
	for {
		var err error
		if len(w.all) == 1 {
			w.n, err = unix.Write(int(fd), w.all[0])
		} else {
			w.n, err = unix.Writev(int(fd), w.all)
		}
		if errors.Is(err, unix.EINTR) {
			continue
		}
		w.n = max(w.n, 0)
		if errors.Is(err, unix.EAGAIN) {
			err = nil
		}
		w.fail = os.NewSyscallError("write", err)
		return true
	}
}
