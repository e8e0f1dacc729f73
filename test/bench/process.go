package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// process is a program that this one started and will end.
type process struct {
	name string
	log  string
	cmd  *exec.Cmd
	done chan struct{} // closed when it has ended, with err set
	err  error
}

// start starts a program whose output goes to a file in dir. env is added to this program's own.
func start(dir, name string, env []string, bin string, args ...string) (*process, error) {
	p := &process{name: name, log: filepath.Join(dir, name+".log"), done: make(chan struct{})}
	output, err := os.Create(p.log)
	if err != nil {
		return nil, fmt.Errorf("make log of %s: %w", name, err)
	}
	defer output.Close()
	p.cmd = exec.Command(bin, args...)
	p.cmd.Stdout, p.cmd.Stderr, p.cmd.Dir = output, output, dir
	p.cmd.Env = append(os.Environ(), env...)
	// Should this program be killed, the kernel ends what it started.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	go func() {
		p.err = p.cmd.Wait()
		close(p.done)
	}()
	return p, nil
}

func (p *process) pid() int { return p.cmd.Process.Pid }

// ready polls until try returns nil, and gives up when the process ends, ctx ends or half a minute
// is over.
func (p *process) ready(ctx context.Context, try func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		attempt, done := context.WithTimeout(ctx, time.Second)
		err := try(attempt)
		done()
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended (%w): %s", p.name, p.err, p.tail())
		case <-ctx.Done():
			return fmt.Errorf("wait for %s: %w; its log ends with: %s", p.name, err, p.tail())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func (p *process) tail() string {
	b, err := os.ReadFile(p.log)
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(b[max(0, len(b)-2048):]))
}

// stop asks the process to end, and kills it when it has not after a while.
func (p *process) stop() {
	// it fails when the process has ended, which is what is wanted
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.done:
	case <-time.After(10 * time.Second):
		_ = p.cmd.Process.Kill()
		<-p.done
	}
}

// freeAddress is a port of 127.0.0.1 that nothing listens on, below the range that outgoing
// connections take their ports from.
func freeAddress() (string, error) {
	for range 100 {
		address := fmt.Sprintf("127.0.0.1:%d", 10000+rand.IntN(22000))
		if l, err := net.Listen("tcp", address); err == nil {
			l.Close()
			return address, nil
		}
	}
	return "", errors.New("find a free port: a hundred tries failed")
}

// The sources of CPU time, for the report.
const (
	sourceSchedstat = "/proc/PID/task/*/schedstat (ns on a CPU, all threads)"
	sourceStat      = "/proc/PID/stat (utime+stime, ticks of 10 ms)"
)

// cpuSource says which source this kernel has.
func cpuSource() string {
	if _, err := schedstat(os.Getpid()); err != nil {
		return sourceStat
	}
	return sourceSchedstat
}

// cpuTime is how long the threads of a process have been on a CPU. With schedstat, the time of
// threads that have ended is lost; a Go program all but never ends one.
func cpuTime(pid int) (time.Duration, error) {
	if d, err := schedstat(pid); err == nil {
		return d, nil
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, fmt.Errorf("read CPU time: %w", err)
	}
	// The second field is the program's name in brackets, which may hold anything. utime and stime
	// are the 12th and 13th behind it.
	fields := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
	if len(fields) < 13 {
		return 0, fmt.Errorf("read CPU time: /proc/%d/stat is of an unknown shape", pid)
	}
	var ticks time.Duration
	for _, f := range fields[11:13] {
		n, err := strconv.ParseInt(f, 10, 64)
		if err != nil {
			return 0, fmt.Errorf("read CPU time: %w", err)
		}
		ticks += time.Duration(n)
	}
	return ticks * 10 * time.Millisecond, nil
}

func schedstat(pid int) (time.Duration, error) {
	dir := fmt.Sprintf("/proc/%d/task", pid)
	tasks, err := os.ReadDir(dir)
	if err != nil {
		return 0, err
	}
	var sum time.Duration
	for _, task := range tasks {
		b, err := os.ReadFile(filepath.Join(dir, task.Name(), "schedstat"))
		if errors.Is(err, os.ErrNotExist) && len(tasks) > 1 && task.Name() != strconv.Itoa(pid) {
			continue // a thread that has just ended
		}
		if err != nil {
			return 0, err
		}
		onCPU, _, _ := strings.Cut(string(b), " ")
		n, err := strconv.ParseInt(onCPU, 10, 64)
		if err != nil {
			return 0, err
		}
		sum += time.Duration(n)
	}
	return sum, nil
}

// resetPeakMemory makes peakMemory count from now on.
func resetPeakMemory(pid int) error {
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0); err != nil {
		return fmt.Errorf("reset peak memory: %w", err)
	}
	return nil
}

// peakMemory is the most memory that the process has had resident, in bytes.
func peakMemory(pid int) (int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0, fmt.Errorf("read memory: %w", err)
	}
	for line := range strings.Lines(string(b)) {
		if rest, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			n, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(rest), " kB"), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("read memory: %w", err)
			}
			return n << 10, nil
		}
	}
	return 0, fmt.Errorf("read memory: /proc/%d/status has no VmHWM", pid)
}
