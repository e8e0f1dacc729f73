package auditlog

import "syscall"

func mountSmall(dir string) error { return syscall.Mount("none", dir, "tmpfs", 0, "size=64k") }

func unmount(dir string) error { return syscall.Unmount(dir, 0) }
