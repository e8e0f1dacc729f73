package harness

import "syscall"

// endWithParent makes the kernel end a process whose test binary has ended without a cleanup, for
// example after a timeout.
func endWithParent() *syscall.SysProcAttr {
	return &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
}
