//go:build !linux

package harness

import "syscall"

// endWithParent does nothing where the kernel has no such feature.
func endWithParent() *syscall.SysProcAttr { return nil }
