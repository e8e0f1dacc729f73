package cli

import (
	"os"
	"syscall"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
)

// TestNewVersionOfAKeyFile: it is used at once when the file changes, and, where the change is not
// seen, since it is behind a link to another folder, with SIGHUP; also when the configuration
// cannot be reloaded then.
func TestNewVersionOfAKeyFile(t *testing.T) {
	for name, c := range map[string]struct{ linked, broken bool }{"changed file": {}, "SIGHUP": {linked: true}, "SIGHUP with a broken configuration": {linked: true, broken: true}} {
		t.Run(name, func(t *testing.T) {
			d, elsewhere := clitest.NewDir(t), clitest.NewDir(t)
			file := d.Path("key.yaml")
			if c.linked {
				file = elsewhere.Path("key.yaml")
				if err := os.Remove(d.Path("key.yaml")); err != nil {
					t.Fatal(err)
				}
				if err := os.Symlink(file, d.Path("key.yaml")); err != nil {
					t.Fatal(err)
				}
			}
			path := d.Config(t)
			s := start(t, path)
			s.logged(`"msg":"DEK seed generated","provider":"dev","keyID":"1"`)
			s.logged(`"msg":"KMS key is usable"`)
			execute(t, "kms", "new-local-key", file).want(t, 0)
			if c.broken {
				d.Config(t, "kind: ProxyConfiguration", "kind: Something")
			}
			if c.linked {
				s.signal(syscall.SIGHUP)
			}
			s.logged(`"msg":"DEK seed generated","provider":"dev","keyID":"2"`)
			s.signal(syscall.SIGTERM)
			s.exited(0)
		})
	}
}
