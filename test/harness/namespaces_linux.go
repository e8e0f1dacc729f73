package harness

import (
	"os/exec"
	"runtime"
	"syscall"
)

// StartInNamespaces starts cmd as the first process of a machine of its own: in new namespaces of
// processes, networks, host names, IPC and mounts. stop kills it, and with it all other processes
// of the machine, and waits for it.
func StartInNamespaces(cmd *exec.Cmd) (stop func(), err error) {
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWPID | syscall.CLONE_NEWNET | syscall.CLONE_NEWUTS | syscall.CLONE_NEWIPC,
		// This one also makes the mounts private, before the process runs.
		Unshareflags: syscall.CLONE_NEWNS,
		Pdeathsig:    syscall.SIGKILL,
	}
	started, end, done := make(chan error), make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // the kernel kills the process when the thread that started it ends
		err := cmd.Start()
		started <- err
		if err != nil {
			return
		}
		<-end
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return func() {
		close(end)
		<-done
	}, nil
}
