//go:build !linux

package drill

import "syscall"

func endWithParent() *syscall.SysProcAttr { return nil }
