package cli

import (
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
)

// TestAuditOfServe: what a proxy does from start to stop is in the log, and nothing secret.
func TestAuditOfServe(t *testing.T) {
	d := clitest.NewDir(t)
	d.AuditKey(t)
	const block = "audit: {path: audit.jsonl, keyFile: audit.key}\nkind: "
	s := start(t, d.Config(t, "kind: ", block))
	addressOf(t, s, "listening")
	clitest.Eventually(t, "report of the rule", func() bool {
		_, page := get(t, s, "/readyz")
		return strings.Contains(page, `[+]rule "/registry/secrets/" ok`) && strings.Contains(page, "[+]audit ok")
	})
	d.Config(t, "kind: ", block, "writeWith: dev", "writeWith: plaintext")
	s.logged("would protect keys less")
	d.Config(t, "kind: ", block, "rules:", "rulez-of-canary:")
	s.logged("not reloaded", "rulez-of-canary")
	d.Config(t, "kind: ", block)
	s.signal(syscall.SIGHUP)
	s.logged("configuration reloaded", "SIGHUP")
	if _, page := get(t, s, "/metrics"); !strings.Contains(page, "etcd_kms_proxy_audit_lost_total 0") || !strings.Contains(page, "etcd_kms_proxy_audit_writable 1") {
		t.Error("the metrics of the audit log are missing")
	}
	s.signal(syscall.SIGTERM)
	s.exited(0)

	records := d.AuditLog(t)
	find := func(fields ...any) {
		t.Helper()
		for _, r := range records {
			same := true
			for i := 0; i < len(fields); i += 2 {
				same = same && r[fields[i].(string)] == fields[i+1]
			}
			if same {
				return
			}
		}
		t.Errorf("no record has %v in %v", fields, records)
	}
	if records[0]["event"] != "start" || records[len(records)-1]["event"] != "stop" || len(records[0]["config"].(string)) != 64 {
		t.Errorf("the log begins with %v and ends with %v", records[0], records[len(records)-1])
	}
	find("event", "kms", "provider", "dev", "operation", "Status", "keyID", "1", "class", "ok")
	find("event", "kms", "provider", "dev", "operation", "Encrypt", "keyID", "1", "class", "ok")
	find("event", "reload", "trigger", "changed file", "outcome", "refused",
		"reason", `keys below "/registry/secrets/" would be written as plaintext: their values were encrypted with "dev"`)
	find("event", "reload", "outcome", "failed", "reason", "1 problem, the first on line 11")
	find("event", "reload", "trigger", "SIGHUP", "outcome", "applied")
	for _, r := range records {
		if strings.Contains(strings.ToLower(r["hash"].(string)), "canary") || r["reason"] != nil && strings.Contains(r["reason"].(string), "canary") {
			t.Errorf("a reason quotes the file: %v", r)
		}
	}

	r := execute(t, "audit", "verify", d.Path("audit.jsonl"), "--key-file", d.Path("audit.key"))
	r.want(t, 0)
	last := records[len(records)-1]["hash"].(string)
	for _, text := range []string{"ok\n", "chain      keyed\n", "last hash  " + last} {
		if !strings.Contains(r.stdout, text) {
			t.Errorf("no %q in\n%s", text, r.stdout)
		}
	}
	execute(t, "audit", "verify", d.Path("audit.jsonl")).want(t, 2, "error: ", "the chain is keyed", "hint: give the key with --key-file")

	// A second run goes on in the same chain.
	s = start(t, d.Config(t, "kind: ", block))
	addressOf(t, s, "listening")
	s.signal(syscall.SIGTERM)
	s.exited(0)
	r = execute(t, "audit", "verify", d.Path("audit.jsonl"), "--key-file", d.Path("audit.key"), "--expect-last", last)
	r.want(t, 0)
	if !strings.Contains(r.stdout, "expected   found, with ") {
		t.Errorf("report:\n%s", r.stdout)
	}
}

func TestAuditBadInput(t *testing.T) {
	d := clitest.NewDir(t)
	d.AuditKey(t)
	if err := os.Chmod(d.Path("audit.key"), 0o660); err != nil {
		t.Fatal(err)
	}
	path := d.Config(t, "kind: ", "audit: {path: audit.jsonl, keyFile: audit.key}\nkind: ")
	execute(t, "config", "check", "--config", path).want(t, 1, "audit.keyFile: ", "chmod 600")
	execute(t, "serve", "--config", path).want(t, 3, "audit key ", "chmod 600")
	path = d.Config(t, "kind: ", "audit: {path: key.yaml}\nkind: ")
	execute(t, "serve", "--config", path).want(t, 3, "key.yaml: it is not an audit log")
}

// TestAuditNotRequired: the proxy goes on, and says what was lost.
func TestAuditNotRequired(t *testing.T) {
	d := clitest.NewDir(t)
	s := start(t, d.Config(t, "kind: ", "audit: {path: audit.jsonl}\nkind: "))
	addressOf(t, s, "listening")
	unblock := d.Block(t)
	s.signal(syscall.SIGHUP)
	s.signal(syscall.SIGHUP)
	s.logged("the audit log cannot be written: records are lost")
	clitest.Eventually(t, "count of what is lost", func() bool {
		_, page := get(t, s, "/metrics")
		return !strings.Contains(page, "etcd_kms_proxy_audit_lost_total 0") && strings.Contains(page, "etcd_kms_proxy_audit_writable 0")
	})
	if code, page := get(t, s, "/readyz"); code != http.StatusOK || !strings.Contains(page, "[-]audit: ") || !strings.Contains(page, `[+]rule "/registry/secrets/" ok`) {
		t.Errorf("HTTP %d:\n%s", code, page)
	}
	unblock()
	s.signal(syscall.SIGTERM)
	s.exited(0)
	s.logged("the audit log is written again")
	r := execute(t, "audit", "verify", d.Path("audit.jsonl"))
	r.want(t, 0)
	if !strings.Contains(r.stdout, "could not be written\n") {
		t.Errorf("report:\n%s", r.stdout)
	}
}
