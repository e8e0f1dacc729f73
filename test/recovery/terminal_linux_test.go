package recovery

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// ctrlC is what a terminal turns into SIGINT.
const ctrlC = "\x03"

// onTerminal runs a command of the proxy on a terminal of its own, types the passphrase when the
// command asks for it, and returns what the terminal shows.
func (s *site) onTerminal(t *testing.T, passphrase string, args ...string) string {
	t.Helper()
	shown, _ := s.typeOn(t, "passphrase of ", passphrase+"\n", args...)
	return shown
}

// typeOn runs a command of the proxy on a terminal of its own, and types text when the command asks
// a question that contains this one. It returns what the terminal shows and the exit code. A
// question for a passphrase must turn the echo of the terminal off, and each end of a command must
// leave it on.
func (s *site) typeOn(t *testing.T, question, text string, args ...string) (string, int) {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer master.Close()
	if err := unix.IoctlSetPointerInt(int(master.Fd()), unix.TIOCSPTLCK, 0); err != nil {
		t.Fatal(err)
	}
	number, err := unix.IoctlGetInt(int(master.Fd()), unix.TIOCGPTN)
	if err != nil {
		t.Fatal(err)
	}
	terminal, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", number), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), harness.Bin(t, "etcd-kms-proxy"), args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = terminal, terminal, terminal
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	_ = terminal.Close()
	type chunk struct {
		data []byte
		err  error
	}
	chunks := make(chan chunk)
	go func() {
		for {
			b := make([]byte, 4096)
			n, err := master.Read(b)
			chunks <- chunk{b[:n], err}
			if err != nil {
				return // EIO when the command has ended
			}
		}
	}()
	var shown bytes.Buffer
	typed, timeout := false, time.After(within)
	for {
		select {
		case c := <-chunks:
			shown.Write(c.data)
			if _, asked, ok := strings.Cut(shown.String(), question); !typed && ok && strings.HasSuffix(asked, " ") {
				typed = true
				if strings.HasPrefix(question, "passphrase") {
					harness.Eventually(t, within, "the terminal to show nothing that is typed", func() error {
						if echoes(t, master) {
							return errors.New("it does")
						}
						return nil
					})
				}
				if _, err := master.WriteString(text); err != nil {
					t.Fatal(err)
				}
			}
			if c.err == nil {
				continue
			}
			var exit *exec.ExitError
			if err := cmd.Wait(); err != nil && !errors.As(err, &exit) {
				t.Fatal(err)
			}
			if found := s.env.Sealed.Search("terminal", shown.Bytes()); len(found) > 0 {
				t.Errorf("the terminal shows secrets: %v", found)
			}
			if !echoes(t, master) {
				t.Error("the terminal does not show what is typed any more")
			}
			return shown.String(), cmd.ProcessState.ExitCode()
		case <-timeout:
			_ = cmd.Process.Kill()
			t.Fatalf("the command does not end: %s", &shown)
		}
	}
}

// echoes reports whether a terminal shows what is typed.
func echoes(t *testing.T, master *os.File) bool {
	t.Helper()
	settings, err := unix.IoctlGetTermios(int(master.Fd()), unix.TCGETS)
	if err != nil {
		t.Fatal(err)
	}
	return settings.Lflag&unix.ECHO != 0
}

// TestCtrlC interrupts commands that wait for an answer, and one that waits for etcd. decrypt
// handles the signal itself, kms check does not.
func TestCtrlC(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	safe := newOffline(t, s, "safe")
	protected, _ := s.protectedFile(t, safe)
	s.run(t, harness.Rule{WriteWith: "local", Recovery: []string{"offline"}}, s.env.LocalKey("local", 1), offlineKMS(safe))
	s.fill(t, "value", 1)
	config := []string{"--config", s.proxy.ConfigFile}
	interrupt := func(question string, args ...string) {
		t.Helper()
		out, code := s.typeOn(t, question, ctrlC, append(args, config...)...)
		if code != 3 || !strings.HasSuffix(strings.TrimSpace(out), "error: interrupted") {
			t.Errorf("%q: exit code %d, shows %q", args, code, out)
		}
	}
	interrupt("[y/N]", "decrypt", prefix+"value0")
	interrupt("[y/N]", "purge")
	interrupt("passphrase of ", "decrypt", "--yes", prefix+"value0", "--identity", protected)
	interrupt("passphrase of ", "kms", "check", "--identity", protected)
}
