package server

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// TestBypassOfBytes: keys that are not UTF-8 are told from each other in the log and the audit log.
func TestBypassOfBytes(t *testing.T) {
	var logged bytes.Buffer
	path := filepath.Join(t.TempDir(), "audit.log")
	records, err := auditlog.Open(auditlog.Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	b := newBypasses(records, prometheus.NewRegistry(), slog.New(slog.NewJSONHandler(&logged, nil)))
	rule := &inventory.Rule{Prefix: "\xff"}
	b.found(rule, "\xffA\xfe", 3)
	b.found(rule, "\xffA\xfd", 4)
	if err := records.Close(); err != nil {
		t.Fatal(err)
	}
	recorded, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"rule":"\\xff"`, `"key":"\\xffA\\xfe"`} {
		if !strings.Contains(logged.String(), want) {
			t.Errorf("%s is not in the log: %s", want, logged.String())
		}
	}
	for _, want := range []string{`"rule":"\\xff"`, `"key":"\\xffA\\xfe"`, `"key":"\\xffA\\xfd"`} {
		if !strings.Contains(string(recorded), want) {
			t.Errorf("%s is not in the audit log: %s", want, recorded)
		}
	}
}
