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

// onTerminal runs a command of the proxy on a terminal of its own, types the passphrase when the
// command asks for it, and returns what the terminal shows.
func (s *site) onTerminal(t *testing.T, passphrase string, args ...string) string {
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
			if !typed && strings.Contains(shown.String(), "passphrase of ") && strings.HasSuffix(shown.String(), ": ") {
				typed = true
				harness.Eventually(t, within, "the terminal to show nothing that is typed", func() error {
					settings, err := unix.IoctlGetTermios(int(master.Fd()), unix.TCGETS)
					if err == nil && settings.Lflag&unix.ECHO != 0 {
						err = errors.New("it does")
					}
					return err
				})
				if _, err := master.WriteString(passphrase + "\n"); err != nil {
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
			return shown.String()
		case <-timeout:
			_ = cmd.Process.Kill()
			t.Fatalf("the command does not end: %s", &shown)
		}
	}
}
