package cli

import (
	"bytes"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// asCommand makes the test binary be the command itself, so that the scripts run what main runs, with the race detector where the tests have it.
const asCommand = "ETCD_KMS_PROXY_TEST_AS_COMMAND"

func TestMain(m *testing.M) {
	if os.Getenv(asCommand) != "" {
		os.Exit(Main(""))
		return
	}
	goleak.VerifyTestMain(m, goleak.Cleanup(func(code int) {
		if what := told.leak(); what != "" {
			fmt.Fprintln(os.Stderr, "a command has shown", what)
			code = 1
		}
		os.Exit(code)
	}))
}

// deadline bounds everything that a test waits for.
const deadline = 20 * time.Second

// result is what a finished command left.
type result struct {
	code           int
	stdout, stderr string
}

func command(args ...string) *exec.Cmd {
	cmd := exec.Command(os.Args[0], args...)
	cmd.Env = append(os.Environ(), asCommand+"=1")
	return cmd
}

// execute runs a command that ends by itself, within the test's process: a new one for each takes long with the race detector.
func execute(t *testing.T, args ...string) result {
	t.Helper()
	if len(args) > 0 && args[0] == "serve" {
		return executeAlone(t, args...) // it changes its whole process
	}
	var stdout, stderr bytes.Buffer
	code := run(args, &stdout, &stderr)
	told.output(stdout.Bytes(), stderr.Bytes())
	return result{code, stdout.String(), stderr.String()}
}

// executeAlone runs a command in a process of its own.
func executeAlone(t *testing.T, args ...string) result {
	t.Helper()
	cmd := command(args...)
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	timer := time.AfterFunc(deadline, func() { _ = cmd.Process.Kill() })
	defer timer.Stop()
	_ = cmd.Wait() // its code says it
	told.output(stdout.Bytes(), stderr.Bytes())
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

// server is a running serve.
type server struct {
	t    *testing.T
	cmd  *exec.Cmd
	done chan struct{}
	mu   sync.Mutex
	log  bytes.Buffer
}

// Write takes standard error.
func (s *server) Write(b []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.Write(b)
}

func (s *server) text() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.log.String()
}

// start runs serve until the test ends.
func start(t *testing.T, config string, args ...string) *server {
	t.Helper()
	s := &server{t: t, cmd: command(append([]string{"serve", "--config", config}, args...)...), done: make(chan struct{})}
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
		told.output([]byte(s.text()))
		if t.Failed() {
			t.Logf("log of serve:\n%s", s.text())
		}
	})
	return s
}

func (s *server) signal(sig syscall.Signal) {
	s.t.Helper()
	if err := s.cmd.Process.Signal(sig); err != nil {
		s.t.Fatal(err)
	}
}

// logged waits until a line of the log holds all texts, and returns it.
func (s *server) logged(texts ...string) string {
	s.t.Helper()
	var found string
	eventually(s.t, fmt.Sprintf("log line with %q", texts), func() bool {
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
func (s *server) exited(code int) {
	s.t.Helper()
	select {
	case <-s.done:
	case <-time.After(deadline):
		s.t.Fatal("serve does not end")
	}
	if got := s.cmd.ProcessState.ExitCode(); got != code {
		s.t.Errorf("exit code %d, want %d", got, code)
	}
}

func (s *server) running() bool {
	select {
	case <-s.done:
		return false
	default:
		return true
	}
}

// eventually polls until ok.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(deadline); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s within %v", what, deadline)
		}
	}
}

// dir is a folder with a key file and whatever configurations the test writes.
type dir string

func newDir(t *testing.T) dir {
	t.Helper()
	d := dir(t.TempDir())
	execute(t, "kms", "new-local-key", d.path("key.yaml")).want(t, 0)
	t.Cleanup(func() { told.keyFile(t, d.path("key.yaml")) }) // with the versions that the test added
	return d
}

// withRecovery are edits of the configuration that put a recovery key beside the rule's.
func withRecovery() []string {
	return []string{"rules:", "- name: dr\n  local: {keyFile: key.yaml}\nrules:", "writeWith: dev", "writeWith: dev\n  recovery: [dr]"}
}

func (d dir) path(name string) string { return filepath.Join(string(d), name) }

// config is a file that serves on free ports and seals under the folder's key; edits replace parts of it, old and new in turn.
func (d dir) config(t *testing.T, edits ...string) string {
	t.Helper()
	text := strings.NewReplacer(edits...).Replace(`apiVersion: etcd-kms-proxy.io/v1alpha1
kind: ProxyConfiguration
listeners:
- address: 127.0.0.1:0
etcd:
  endpoints: [http://127.0.0.1:1]
kms:
- name: dev
  local: {keyFile: key.yaml}
rules:
- prefix: /registry/secrets/
  writeWith: dev
admin: {address: "127.0.0.1:0"}
log: {level: debug}
`)
	path := d.path("config.yaml")
	// A new file in the old one's place, as careful editors and mounts do it.
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	return path
}

// occupy listens on a free port until the test ends.
func occupy(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l.Addr().String()
}

var errNoAddress = errors.New("the log line has no address")
