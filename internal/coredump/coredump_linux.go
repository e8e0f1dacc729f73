// Package coredump keeps keys and values that are in memory out of core dumps.
package coredump

import (
	"fmt"
	"syscall"
)

const prSetDumpable = 4 // PR_SET_DUMPABLE of prctl(2)

// Forbid keeps the memory of the process out of core files, and away from other processes of the
// same user (ptrace, /proc/PID/mem). Child processes inherit the former only; there are none.
func Forbid() error {
	if err := syscall.Setrlimit(syscall.RLIMIT_CORE, &syscall.Rlimit{}); err != nil {
		return fmt.Errorf("set RLIMIT_CORE: %w", err)
	}
	if _, _, errno := syscall.RawSyscall(syscall.SYS_PRCTL, prSetDumpable, 0, 0); errno != 0 {
		return fmt.Errorf("set PR_SET_DUMPABLE: %w", errno)
	}
	return nil
}
