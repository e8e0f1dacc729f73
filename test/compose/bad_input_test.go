package compose

import (
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// says waits until the logs of a service contain all texts.
func (s *stack) says(service string, texts ...string) {
	s.t.Helper()
	harness.Eventually(s.t, within, service+" to say what is wrong", func() error {
		logs, err := s.try(s.t.Context(), "logs", service)
		if err != nil {
			return err
		}
		for _, text := range texts {
			if !strings.Contains(logs, text) {
				return fmt.Errorf("no %q in\n%s", text, logs)
			}
		}
		return nil
	})
}

// override is an additional file for Compose.
func (s *stack) override(text string) {
	s.t.Helper()
	path := filepath.Join(s.scratch, "override.yml")
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		s.t.Fatal(err)
	}
	s.extra = []string{"-f", path}
}

// volume runs a command as root on a volume of the stack, without the services' restrictions, as an
// operator may do by mistake.
func (s *stack) volume(name, script string) {
	s.t.Helper()
	s.docker("run", "--rm", "--user", "0", "--entrypoint", "/bin/sh", "-v", s.project+"_"+name+":/v", goImage(s.t), "-ec", script)
}

// goImage is an image with a shell: that of the Dockerfile's first stage.
func goImage(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", "..", "Dockerfile"))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(data), "ARG GO_IMAGE=")
	name, _, _ := strings.Cut(rest, "\n")
	return name
}

// TestBadInput checks that `up` or the logs report each mistake in words, with a remedy.
func TestBadInput(t *testing.T) {
	t.Run("a port is taken", func(t *testing.T) {
		s := newStack(t, composeV2(t))
		l, err := net.Listen("tcp", s.ports["PROXY_2_ADDRESS"])
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		out, err := s.try(t.Context(), "up", "-d")
		if _, port, _ := net.SplitHostPort(s.ports["PROXY_2_ADDRESS"]); err == nil || !strings.Contains(out, "address already in use") || !strings.Contains(out, port) {
			t.Errorf("up: %v\n%s", err, out)
		}
	})
	t.Run(".env is not filled in", func(t *testing.T) {
		s := newStack(t, composeV2(t))
		s.env = append(s.env, "KMS=alibaba")
		if out, err := s.try(t.Context(), "up", "-d"); err == nil || !strings.Contains(out, "setup") {
			t.Errorf("up: %v\n%s", err, out)
		}
		s.says("setup", "error: KMS is alibaba, and nothing is set for ALIBABA_KMS_REGION", "hint: copy deploy/compose/alibaba.env.example to .env")
	})
	t.Run(".env is lost", func(t *testing.T) {
		s := newStack(t, composeV2(t))
		without := s.env
		s.env = append(slices.Clip(without), "KMS=alibaba", "ALIBABA_KMS_REGION=cn-hangzhou", "ALIBABA_KMS_KEY_ID=key-1",
			"ALIBABA_CLOUD_ACCESS_KEY_ID=id", "ALIBABA_CLOUD_ACCESS_KEY_SECRET=secret")
		s.run("up", "setup")
		s.env = without
		if out, err := s.try(t.Context(), "up", "-d"); err == nil {
			t.Errorf("it starts without its KMS:\n%s", out)
		}
		s.says("setup", "error: this stack encrypts with Alibaba Cloud KMS, and the environment does not name it: is .env missing?", "hint: restore .env")
	})
	t.Run("a started stack", func(t *testing.T) {
		s := newStack(t, composeV2(t))
		s.up()
		for _, tt := range []struct {
			name, volume, script, override string
			setup                          []string // output of setup, which then starts nothing
			proxy                          []string // output of the proxies
			repair                         string
		}{
			{
				name: "a key file that others may use", volume: "proxy", script: "chmod 0666 /v/key.yaml", repair: "chmod 0600 /v/key.yaml",
				proxy: []string{"users other than its owner can use it (mode 0666)", "chmod 600"},
			},
			{
				name: "a folder where the configuration should be", volume: "proxy", script: "rm /v/config.yaml && mkdir /v/config.yaml",
				repair: "rmdir /v/config.yaml", setup: []string{"error: ", "config.yaml"},
			},
			{
				name: "a volume of another user", volume: "proxy", script: "chown 0:0 /v", repair: "chown 65532:65532 /v",
				setup: []string{"permission denied", "hint: the folders belong to the user of the image, 65532"},
			},
			{
				name: "containers that run as root", override: "services: {setup: {user: \"0\"}, proxy-1: {user: \"0\"}}\n",
				setup: []string{"permission denied", "and this runs as 0: remove `user:` from the service"},
			},
			{
				name: "the local key is gone", volume: "proxy", script: "mv /v/key.yaml /v/lost", repair: "mv /v/lost /v/key.yaml",
				setup: []string{"the local key that it was encrypted with is gone", "hint: restore the key file"},
			},
		} {
			t.Run(tt.name, func(t *testing.T) {
				s := *s // with the subtest's own t
				s.t = t
				if tt.script != "" {
					s.volume(tt.volume, tt.script)
				}
				if tt.override != "" {
					s.override(tt.override)
				}
				out, err := s.try(t.Context(), "up", "-d", "--force-recreate", "setup", "proxy-1")
				if (err == nil) != (tt.setup == nil) {
					t.Errorf("up: %v\n%s", err, out)
				}
				if tt.setup != nil {
					s.says("setup", tt.setup...)
				}
				if tt.proxy != nil {
					s.says("proxy-1", tt.proxy...)
				}
				if tt.repair != "" {
					s.volume(tt.volume, tt.repair)
				}
				s.extra = nil
				harness.Eventually(t, within, "the stack to be back", func() error {
					out, err := s.try(t.Context(), "up", "-d", "--force-recreate", "setup", "proxy-1")
					if err != nil {
						return errors.New(out)
					}
					return nil
				})
				s.healthy("proxy-1")
			})
		}
	})
	t.Run("a wrong certificate", func(t *testing.T) {
		s := newStack(t, composeV2(t))
		s.up()
		s.volume("proxy", "cat /v/client-ca.crt >/v/etcd-ca.crt")
		s.docker("restart", s.container("proxy-1"))
		s.says("proxy-1", "certificate signed by unknown authority")
		s.up() // the job writes the right one again
		s.run("run", "--rm", "-e", "ETCDCTL_ENDPOINTS=https://proxy-1:2379", "etcdctl", "put", "key", "value")
	})
	t.Run("a wrong clock", wrongClock)
	t.Run("a full volume of etcd", func(t *testing.T) {
		s := newStack(t, composeV2(t))
		s.override("volumes:\n  etcd-1: {driver_opts: {type: tmpfs, device: tmpfs, o: \"size=16m,uid=65532,gid=65532,mode=0700\"}}\n")
		if out, err := s.try(t.Context(), "up", "-d"); err == nil {
			t.Errorf("it starts without room for a member's log:\n%s", out)
		}
		s.says("etcd-1", "no space left on device")
	})
	t.Run("a full volume of the audit log", func(t *testing.T) {
		s := newStack(t, composeV2(t))
		s.override("volumes:\n  proxy-1-audit: {driver_opts: {type: tmpfs, device: tmpfs, o: \"size=1m,uid=65532,gid=65532,mode=0700\"}}\n")
		s.up()
		s.volume("proxy-1-audit", "cat /dev/zero >/v/filler || true")
		harness.Eventually(t, within, "proxy-1 to say that the volume is full", func() error {
			s.volume("proxy", "echo '# changed' >>/v/config.yaml") // each reload is a record; the last page of the log has room for some
			logs, err := s.try(t.Context(), "logs", "proxy-1")
			if err == nil && (!strings.Contains(logs, "the audit log cannot be written") || !strings.Contains(logs, "no space left on device")) {
				err = errors.New(logs)
			}
			return err
		})
		s.healthy("proxy-1") // audit.required is not set
		s.volume("proxy-1-audit", "rm /v/filler")
		s.volume("proxy", "echo '# changed' >>/v/config.yaml")
		s.says("proxy-1", "the audit log is written again")
	})
	t.Run("a full disk", func(t *testing.T) {
		s := newStack(t, composeV2(t))
		s.override("volumes:\n  proxy: {driver_opts: {type: tmpfs, device: tmpfs, o: \"size=4k,uid=65532,gid=65532,mode=0700\"}}\n")
		if out, err := s.try(t.Context(), "up", "-d"); err == nil {
			t.Errorf("it starts on a full disk:\n%s", out)
		}
		s.says("setup", "no space left on device", "hint: make room on the disk that has Docker's volumes")
	})
}
