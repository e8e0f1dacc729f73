package drill

import (
	"context"
	"errors"
	"os/exec"
	"path/filepath"
	"runtime"
	"syscall"
	"time"
)

// process is a running program.
type process struct {
	cmd    *exec.Cmd
	out    tail            // complete once it has ended
	ended  context.Context // done once it has ended
	failed error           // why it ended; valid then
}

// onOneThread calls f on an operating system thread that is not used for anything else meanwhile.
// Linux ends a child with the thread that started it, and Go ends threads.
func onOneThread(f func() error) error {
	done := make(chan error)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		done <- f()
	}()
	return <-done
}

// start starts a program that runs until [process.stop], or until this process ends.
func start(folder, program string, args ...string) (*process, error) {
	ended, end := context.WithCancel(context.Background())
	p := &process{cmd: command(context.Background(), folder, program, args...), ended: ended}
	p.cmd.Stdout, p.cmd.Stderr = &p.out, &p.out
	p.cmd.WaitDelay = stopWithin
	started := make(chan error)
	go func() {
		defer end()
		_ = onOneThread(func() error {
			err := p.cmd.Start()
			started <- err
			if err == nil {
				p.failed = p.cmd.Wait()
			}
			return nil
		})
	}()
	if err := <-started; err != nil {
		return nil, err
	}
	return p, nil
}

// why returns why a process has ended that should not have.
func (p *process) why() error {
	err := p.failed
	if err == nil {
		err = errors.New("it ended")
	}
	return p.out.explain(filepath.Base(p.cmd.Path), err)
}

// stop ends the process, at once if it takes longer than within.
func (p *process) stop(within time.Duration) {
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // an error: it has ended
	select {
	case <-p.ended.Done():
	case <-time.After(within):
		_ = p.cmd.Process.Kill()
		<-p.ended.Done()
	}
}
