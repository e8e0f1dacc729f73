package cli

import (
	"path/filepath"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
)

// TestSetupComposeCommand: what the system refuses is told with what to do.
func TestSetupComposeCommand(t *testing.T) {
	dir := t.TempDir()
	if r := execute(t, "setup", "compose", "--dir", dir); r.code != 0 || r.stdout+r.stderr != "" {
		t.Errorf("exit code %d, %q, %q; want silence", r.code, r.stdout, r.stderr)
	}
	execute(t, "setup", "compose", "--dir", filepath.Join(dir, "none")).want(t, command.ExitFailure, "no such file", "hint: create the folder")
	execute(t, "setup").want(t, command.ExitUsage, "hint: ")
}
