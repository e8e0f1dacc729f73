package cli

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
)

func TestAuditVerify(t *testing.T) {
	d := clitest.NewDir(t)
	l, err := auditlog.Open(auditlog.Config{Path: d.Path("a")})
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		l.Record(auditlog.Record{Event: auditlog.EventStart})
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile(d.Path("a"))
	if err != nil {
		t.Fatal(err)
	}
	execute(t, "audit", "verify", d.Path("a")).want(t, 0)
	lines := bytes.SplitAfter(text, []byte("\n"))
	lines[1] = bytes.Replace(lines[1], []byte("start"), []byte("stop"), 1)
	if err := os.WriteFile(d.Path("a"), bytes.Join(append(lines[:3:3], lines[4:]...), nil), 0o600); err != nil {
		t.Fatal(err)
	}
	r := execute(t, "audit", "verify", d.Path("a"))
	r.want(t, 1)
	for _, text := range []string{"2 findings\n", d.Path("a") + ":2: altered: record 2 ", d.Path("a") + ":4: missing: record 4 is "} {
		if !strings.Contains(r.stdout, text) {
			t.Errorf("no %q in\n%s", text, r.stdout)
		}
	}
	r = execute(t, "audit", "verify", d.Path("a"), "-o", "json")
	r.want(t, 1)
	var report auditlog.Report
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || report.OK || len(report.Findings) != 2 || report.Findings[0].Line != 2 || report.LastSeq != 5 {
		t.Errorf("%v: %+v", err, report)
	}
	execute(t, "audit", "verify", d.Path("a"), d.Path("a")).want(t, 2, "each of them begins with record 1", "hint: verify each log separately")
	execute(t, "audit", "verify", d.Path("a"), "--expect-last", "xyz").want(t, 2, "64 hexadecimal digits")
	execute(t, "audit", "verify", d.Path("none")).want(t, 3, "no such file")
	execute(t, "audit", "verify", d.Path("a"), "--key-file", d.Path("none")).want(t, 3, "read audit key")
	for _, line := range []string{"audit", "audit verify", "audit frobnicate", "audit verify a --output xml"} {
		execute(t, strings.Fields(line)...).want(t, 2, "error: ")
	}
	for _, line := range []string{"audit --help", "audit verify --help"} {
		execute(t, strings.Fields(line)...).want(t, 0)
	}
}
