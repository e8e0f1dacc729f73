package http2conn

import (
	"errors"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// rawConn is the system's side of a connection, or nil.
func rawConn(conn net.Conn) syscall.RawConn {
	if c, ok := conn.(syscall.Conn); ok {
		if raw, err := c.SyscallConn(); err == nil {
			return raw
		}
	}
	return nil
}

// tryOnce writes as much of o.all as the system takes without waiting: the sockets of package net never do.
func (o *WriteBuffer) tryOnce(fd uintptr) bool {
	for {
		var err error
		if len(o.all) == 1 {
			o.n, err = unix.Write(int(fd), o.all[0])
		} else {
			o.n, err = unix.Writev(int(fd), o.all)
		}
		if errors.Is(err, unix.EINTR) {
			continue
		}
		o.n = max(o.n, 0)
		if errors.Is(err, unix.EAGAIN) {
			err = nil
		}
		o.fail = os.NewSyscallError("write", err)
		return true
	}
}
