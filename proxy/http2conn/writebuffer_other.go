//go:build !linux

package http2conn

import (
	"net"
	"syscall"
)

func rawConn(net.Conn) syscall.RawConn { return nil }

func (w *WriteBuffer) tryWrite(uintptr) bool { return true }
