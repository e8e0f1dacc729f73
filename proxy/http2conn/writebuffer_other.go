//go:build !linux

package http2conn

import (
	"net"
	"syscall"
)

func rawConn(net.Conn) syscall.RawConn { return nil }

func (o *WriteBuffer) tryOnce(uintptr) bool { return true }
