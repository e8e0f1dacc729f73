//go:build !linux

package writebuffer

import (
	"net"
	"syscall"
)

func rawConn(net.Conn) syscall.RawConn { return nil }

func (w *Buffer) tryWrite(uintptr) bool { return true }
