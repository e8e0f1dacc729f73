// Package demo runs the script of `make run`.
package demo

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestDemo checks that the script prints what it should, in a folder of any name, and leaves no
// process behind however it ends.
func TestDemo(t *testing.T) {
	// A shell cannot trap a signal that is ignored when it starts, as under nohup.
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP)
	t.Cleanup(func() { signal.Stop(hangups) })
	for _, sig := range []syscall.Signal{syscall.SIGHUP, syscall.SIGINT, syscall.SIGTERM} {
		t.Run(sig.String(), func(t *testing.T) {
			t.Parallel()
			if testing.Short() && sig == syscall.SIGTERM {
				t.Skip("SIGINT is handled as it is")
			}
			dir := filepath.Join(t.TempDir(), "a demo: its {folder}")
			out, err := os.Create(filepath.Join(t.TempDir(), "out"))
			if err != nil {
				t.Fatal(err)
			}
			defer out.Close()
			cmd := exec.Command("sh", "../../deploy/demo.sh")
			cmd.Env = append(os.Environ(), "DEMO_DIR="+dir, "ETCD_KMS_PROXY_BIN="+filepath.Dir(harness.Bin(t, "etcd-kms-proxy")))
			for _, name := range []string{"ETCD_PORT", "PEER_PORT", "PROXY_PORT", "ADMIN_PORT"} {
				cmd.Env = append(cmd.Env, fmt.Sprintf("%s=%d", name, harness.FreePort(t)))
			}
			cmd.Stdout, cmd.Stderr = out, out
			// a terminal signals a process group
			cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			group := cmd.Process.Pid
			ended := make(chan struct{})
			go func() { _ = cmd.Wait(); close(ended) }() // the exit code shows it
			output := func() []byte {
				text, err := os.ReadFile(out.Name())
				if err != nil {
					t.Error(err)
				}
				return text
			}
			t.Cleanup(func() {
				_ = syscall.Kill(-group, syscall.SIGKILL) // nothing remains after a success
				<-ended
				if t.Failed() {
					t.Logf("%s", output())
				}
			})
			harness.Eventually(t, 90*time.Second, "the demo to serve", func() error {
				select {
				case <-ended:
					return fmt.Errorf("it ended: %w", harness.ErrStop)
				default:
				}
				if !bytes.Contains(output(), []byte("serving until Ctrl-C")) {
					return errors.New("not yet")
				}
				return nil
			})
			if text := string(output()); !strings.Contains(text, "k8s:enc:kms:v2:d") || !strings.Contains(text, "the plaintext is in none of them") {
				t.Error("it does not show what etcd stores")
			}
			again := exec.Command("sh", "../../deploy/demo.sh")
			again.Env = cmd.Env
			if out, err := again.CombinedOutput(); err == nil || !strings.Contains(string(out), "error: a demo is running in "+dir) || !strings.Contains(string(out), "DEMO_DIR") {
				t.Errorf("a second one in the same folder: %v\n%s", err, out)
			}
			if err := syscall.Kill(-group, sig); err != nil {
				t.Fatal(err)
			}
			harness.Eventually(t, 90*time.Second, "every process to end", func() error {
				if err := syscall.Kill(-group, 0); !errors.Is(err, syscall.ESRCH) {
					return fmt.Errorf("some are left, and can be signalled: %t", err == nil)
				}
				return nil
			})
			if _, err := os.Stat(filepath.Join(dir, "pid")); err == nil {
				t.Error("it left the mark of one that runs")
			}
			<-ended
			if code := cmd.ProcessState.ExitCode(); code != 0 {
				t.Errorf("exit code %d", code)
			}
		})
	}
}
