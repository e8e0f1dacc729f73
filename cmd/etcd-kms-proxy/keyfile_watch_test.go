package main

import (
	"os"
	"syscall"
	"testing"
)

// TestNewVersionOfAKeyFile: it is used at once when the file changes, and, where the change is not seen, since it is behind a link to another folder, with SIGHUP; also when the
// configuration cannot be reloaded then.
func TestNewVersionOfAKeyFile(t *testing.T) {
	for name, c := range map[string]struct{ linked, broken bool }{"changed file": {}, "SIGHUP": {linked: true}, "SIGHUP with a broken configuration": {linked: true, broken: true}} {
		t.Run(name, func(t *testing.T) {
			d, elsewhere := newDir(t), newDir(t)
			file := d.path("key.yaml")
			if c.linked {
				file = elsewhere.path("key.yaml")
				if err := os.Remove(d.path("key.yaml")); err != nil {
					t.Fatal(err)
				}
				if err := os.Symlink(file, d.path("key.yaml")); err != nil {
					t.Fatal(err)
				}
			}
			path := d.config(t)
			s := start(t, path)
			s.logged(`"msg":"seed minted","provider":"dev","keyID":"1"`)
			s.logged(`"msg":"KMS key is usable"`)
			execute(t, "kms", "new-local-key", file).want(t, 0)
			if c.broken {
				d.config(t, "kind: ProxyConfiguration", "kind: Something")
			}
			if c.linked {
				s.signal(syscall.SIGHUP)
			}
			s.logged(`"msg":"seed minted","provider":"dev","keyID":"2"`)
			s.signal(syscall.SIGTERM)
			s.exited(0)
		})
	}
}
