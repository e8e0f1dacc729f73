package cli

import (
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
)

// TestRefusedEnvironment: no command that could read a secret runs while Go would print what it
// sends.
func TestRefusedEnvironment(t *testing.T) {
	path := clitest.NewDir(t).Config(t)
	for value, refused := range map[string]bool{
		"http2debug=1": true, "http2debug=2": true, "netdns=go,http2debug=2": true, "http2debug=20": true, "http2debug=0": false, "http2client=1": false, "": false,
	} {
		for _, line := range []string{"config check --config " + path, "kms check --config " + path} {
			t.Setenv("GODEBUG", value)
			r := execute(t, strings.Fields(line)...)
			if refused {
				r.want(t, 3, "error: the environment has GODEBUG=http2debug=", "hint: unset it")
			} else {
				r.want(t, 0)
			}
		}
	}
	t.Setenv("GODEBUG", "http2debug=2")
	execute(t, "serve", "--config", path).want(t, 3, "error: the environment has GODEBUG=http2debug=2")
}

// TestNoDumpsBeforeConfiguration: core dumps are off while a command still waits for its
// configuration.
func TestNoDumpsBeforeConfiguration(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("core dumps are turned off on Linux only")
	}
	pipe := filepath.Join(t.TempDir(), "config.yaml")
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{"status", "kms check", "config check"} {
		cmd := process(append(strings.Fields(line), "--config", pipe)...)
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		// Opening the other end waits until the command opens its own. Neither has read or written
		// anything then.
		w, err := os.OpenFile(pipe, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		limits, err := os.ReadFile("/proc/" + strconv.Itoa(cmd.Process.Pid) + "/limits")
		if err != nil {
			t.Fatal(err)
		}
		found := false
		for l := range strings.Lines(string(limits)) {
			if rest, ok := strings.CutPrefix(l, "Max core file size"); ok {
				found = true
				if f := strings.Fields(rest); f[0] != "0" || f[1] != "0" {
					t.Errorf("%s: core dumps are on: %q", line, l)
				}
			}
		}
		if !found {
			t.Errorf("%s: no limit in %s", line, limits)
		}
		timer := time.AfterFunc(clitest.Deadline, func() { _ = cmd.Process.Kill() })
		_ = w.Close()
		_ = cmd.Wait() // the empty file is an error
		timer.Stop()
	}
}
