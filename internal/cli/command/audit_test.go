package command

import (
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/encryption"
)

// TestCommandAudit: commands record beside the proxy's file, several in turn, and are refused where
// the log is required and cannot be written.
func TestCommandAudit(t *testing.T) {
	dir := t.TempDir()
	c := &config.Config{Audit: &config.Audit{Path: filepath.Join(dir, "audit.log"), MaxSizeMiB: 1, MaxFiles: 2, Required: true}}
	held, err := encryption.OpenAudit(c.Audit, nil) // a proxy
	if err != nil {
		t.Fatal(err)
	}
	defer held.Close()
	for range 2 {
		if err := Record(c, io.Discard, auditlog.Record{Command: "reencrypt", Outcome: "begun"}); err != nil {
			t.Fatal(err)
		}
	}
	data, err := os.ReadFile(filepath.Join(dir, "audit.commands.log"))
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(data), `"event":"command"`); n != 2 || !strings.Contains(string(data), `"user":"`) {
		t.Errorf("%d records: %s", n, data)
	}

	c.Audit.Path = filepath.Join(dir, "none", "audit.log")
	if err := Record(c, io.Discard, auditlog.Record{Command: "purge"}); err == nil || !strings.Contains(err.Error(), "purge cannot be recorded") {
		t.Errorf("without a folder: %v", err)
	}
	c.Audit.Required = false
	var warnings strings.Builder
	if err := Record(c, &warnings, auditlog.Record{Command: "purge"}); err != nil || !strings.HasPrefix(warnings.String(), "warning: purge is not in the audit log") {
		t.Errorf("not required: %v, %q", err, warnings.String())
	}
	if err := Record(&config.Config{}, io.Discard, auditlog.Record{}); err != nil {
		t.Error(err)
	}
}

func TestCommandAuditPath(t *testing.T) {
	for path, want := range map[string]string{"/var/audit.log": "/var/audit.commands.log", "/var/a.b/audit": "/var/a.b/audit.commands"} {
		if got := AuditPath(path); got != want {
			t.Errorf("%s: %s, want %s", path, got, want)
		}
	}
}
