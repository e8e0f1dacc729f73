package cli

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
)

// asCommand makes the test binary be the command itself, so that the scripts run what main runs,
// with the race detector where the tests have it.
const asCommand = "ETCD_KMS_PROXY_TEST_AS_COMMAND"

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		os.Exit(Main(""))
		return
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if what := clitest.Told.Leak(); what != "" {
			fmt.Fprintln(os.Stderr, "a command has shown", what)
			code = 1
		}
		os.Exit(code)
	}))
}

// result is what a finished command left.
type result struct {
	code           int
	stdout, stderr string
}

func process(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asCommand+"=1")
	return cmd
}

// execute runs a command that ends by itself, within the test's process: a new one for each takes
// long with the race detector.
func execute(t *testing.T, args ...string) result {
	t.Helper()
	if len(args) > 0 && args[0] == "serve" {
		return executeAlone(t, args...) // it changes its whole process
	}
	var stdout, stderr bytes.Buffer
	code := run(args, &stdout, &stderr)
	clitest.Told.Output(stdout.Bytes(), stderr.Bytes())
	return result{code, stdout.String(), stderr.String()}
}

// executeAlone runs a command in a process of its own.
func executeAlone(t *testing.T, args ...string) result {
	t.Helper()
	cmd := process(args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(clitest.Deadline, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	_ = cmd.Wait() // its code says it
	clitest.Told.Output(stdout.Bytes(), stderr.Bytes())
	return result{cmd.ProcessState.ExitCode(), stdout.String(), stderr.String()}
}

// want checks an exit code and that standard error holds some texts.
func (r result) want(t *testing.T, code int, texts ...string) {
	t.Helper()
	if r.code != code {
		t.Errorf("exit code %d, want %d", r.code, code)
	}
	for _, text := range texts {
		if !strings.Contains(r.stderr, text) {
			t.Errorf("standard error has no %q", text)
		}
	}
	if t.Failed() {
		t.Logf("stdout:\n%s\nstderr:\n%s", r.stdout, r.stderr)
	}
}

// running is a running serve.
type running struct {
	t    *testing.T
	cmd  *exec.Cmd
	done chan struct{}
	mu   sync.Mutex
	log  bytes.Buffer
}

// Write takes standard error.
func (s *running) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.Write(b)
}

func (s *running) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.String()
}

// start runs serve until the test ends.
func start(t *testing.T, config string, args ...string) *running {
	t.Helper()
	s := &running{t: t, cmd: process(append([]string{"serve", "--config", config}, args...)...), done: make(chan struct{})}
	s.cmd.Stderr = s
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(s.done)
		_ = s.cmd.Wait() // its code says it
	}()
	t.Cleanup(func() {
		_ = s.cmd.Process.Kill()
		<-s.done
		clitest.Told.Output([]byte(s.text()))
		if t.Failed() {
			t.Logf("log of serve:\n%s", s.text())
		}
	})
	return s
}

func (s *running) signal(sig syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
}

// logged waits until a line of the log holds all texts, and returns it.
func (s *running) logged(texts ...string) string {
	s.t.Helper()
	var found string
	clitest.Eventually(s.t, fmt.Sprintf("log line with %q", texts), func() bool {
		for line := range strings.Lines(s.text()) {
			missing := false
			for _, text := range texts {
				missing = missing || !strings.Contains(line, text)
			}
			if !missing {
				found = line
				return true
			}
		}
		return false
	})
	return found
}

// exited waits for the end and checks the code.
func (s *running) exited(code int) {
	s.t.Helper()
	select {
	case <-s.done:
	case <-time.After(clitest.Deadline):
		s.t.Fatal("serve does not end")
	}
	if got := s.cmd.ProcessState.ExitCode(); got != code {
		s.t.Errorf("exit code %d, want %d", got, code)
	}
}

func (s *running) running() bool {
	select {
	case <-s.done:
		return false
	default:
		return true
	}
}

var errNoAddress = errors.New("the log line has no address")
