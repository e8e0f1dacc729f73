package harness

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Process is one running program. Its output goes to a log file that is kept across restarts.
type Process struct {
	env  *Env
	name string
	log  string
	cmd  *exec.Cmd
	done chan struct{} // closed when the process has ended and err is set
	err  error
}

// spawn starts a program. The caller registers the cleanup, so that a restarted process keeps its
// place in the order of stopping.
func (e *Env) spawn(name, bin string, args ...string) *Process {
	e.TB.Helper()
	p := &Process{env: e, name: name, log: filepath.Join(e.Dir, name+".log"), done: make(chan struct{})}
	e.addLog(p.log)
	output, err := os.OpenFile(p.log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		e.TB.Fatalf("open log of %s: %v", name, err)
	}
	defer output.Close()
	p.cmd = exec.Command(bin, args...)
	p.cmd.Stdout, p.cmd.Stderr = output, output
	p.cmd.Dir = e.Dir
	if filepath.Base(bin) == "etcd-kms-proxy" {
		p.cmd.Env = append(os.Environ(), e.ProxyEnv...)
	}
	p.cmd.SysProcAttr = endWithParent()
	if err := p.cmd.Start(); err != nil {
		e.TB.Fatalf("start %s: %v", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p
}

// StartProcess starts a program that is not one of the harness' own, and kills it at the end of the
// test. The program runs in the temporary folder, and its output is searched for secrets.
func (e *Env) StartProcess(name, bin string, args ...string) *Process {
	e.TB.Helper()
	p := e.spawn(name, bin, args...)
	e.TB.Cleanup(p.Kill)
	return p
}

// PID returns the process ID.
func (p *Process) PID() int { return p.cmd.Process.Pid }

// Log returns what the process and its predecessors of the same name have printed. It is safe for
// concurrent use.
func (p *Process) Log() string {
	data, err := os.ReadFile(p.log)
	if err != nil {
		return ""
	}
	return string(data)
}

// Alive returns an error that wraps [ErrStop] if the process has ended. It is safe for concurrent
// use.
func (p *Process) Alive() error {
	select {
	case <-p.done:
		return fmt.Errorf("%s ended (%w): %s: %w", p.name, p.err, strings.TrimSpace(tail(p.log, 2<<10)), ErrStop)
	default:
		return nil
	}
}

// Kill ends the process at once, as a crash would, and waits for its end.
func (p *Process) Kill() {
	p.signal(syscall.SIGKILL)
	<-p.done
}

// Stop sends SIGTERM to the process, waits, and kills it after a deadline. It reports whether the
// process ended before the deadline.
func (p *Process) Stop(within time.Duration) bool {
	p.signal(syscall.SIGTERM)
	select {
	case <-p.done:
		return true
	case <-time.After(within):
		p.Kill()
		return false
	}
}

// Wait returns the exit code, or fails the test if the process does not end in time.
func (p *Process) Wait(within time.Duration) int {
	p.env.TB.Helper()
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(within):
		p.env.TB.Fatalf("wait for the end of %s: still running after %v", p.name, within)
		return -1
	}
}

// Peak waits for the end of the process, and returns the most bytes of memory that it was seen to
// use; 0 if there is no /proc. The kernel's own figure at the end includes the memory of the
// process that started it.
func (p *Process) Peak() (peak int64) {
	for {
		status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.PID()))
		if _, rest, ok := strings.Cut(string(status), "VmHWM:"); ok {
			if n, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64); err == nil {
				peak = max(peak, n<<10)
			}
		}
		select {
		case <-p.done:
			return peak
		case <-time.After(2 * time.Millisecond):
		}
	}
}

func (p *Process) signal(s syscall.Signal) {
	if err := p.cmd.Process.Signal(s); err != nil && !errors.Is(err, os.ErrProcessDone) {
		p.env.TB.Errorf("signal %s: %v", p.name, err)
	}
}
