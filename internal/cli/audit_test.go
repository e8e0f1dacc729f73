package cli

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net/http"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

// auditKey makes a key for an audit log. It is a secret like those of key files.
func (d dir) auditKey(t *testing.T) {
	t.Helper()
	key := []byte("audit key, of 32 bytes or more, in the clear")
	told.secret("the key of an audit log", key)
	if err := os.WriteFile(d.path("audit.key"), key, 0o600); err != nil {
		t.Fatal(err)
	}
}

// auditLog reads the records of the folder's log, and gives its text to the search for secrets.
func (d dir) auditLog(t *testing.T) []map[string]any {
	t.Helper()
	return d.auditLogAt(t, "audit.jsonl")
}

func (d dir) auditLogAt(t *testing.T, name string) (records []map[string]any) {
	t.Helper()
	text, err := os.ReadFile(d.path(name))
	if err != nil {
		t.Fatal(err)
	}
	told.output(text)
	for l := range bytes.Lines(text) {
		var r map[string]any
		if err := json.Unmarshal(l, &r); err != nil {
			t.Fatalf("%v: %s", err, l)
		}
		records = append(records, r)
	}
	return records
}

// block puts another file in the place of the log, which nobody may write to then; the result takes it away.
func (d dir) block(t *testing.T) (unblock func()) {
	t.Helper()
	return d.blockAt(t, "audit.jsonl")
}

func (d dir) blockAt(t *testing.T, name string) (unblock func()) {
	t.Helper()
	// In one step: a record between two would find no file, and begin one.
	for _, step := range []error{
		os.WriteFile(d.path("audit.other"), []byte("not an audit log\n"), 0o600),
		os.Link(d.path(name), d.path("audit.kept")),
		os.Rename(d.path("audit.other"), d.path(name)),
	} {
		if step != nil {
			t.Fatal(step)
		}
	}
	return func() {
		t.Helper()
		if err := os.Rename(d.path("audit.kept"), d.path(name)); err != nil {
			t.Fatal(err)
		}
	}
}

// TestAuditOfServe: what a proxy does from start to stop is in the log, and nothing secret.
func TestAuditOfServe(t *testing.T) {
	d := newDir(t)
	d.auditKey(t)
	const block = "audit: {path: audit.jsonl, keyFile: audit.key}\nkind: "
	s := start(t, d.config(t, "kind: ", block))
	addressOf(t, s, "serving")
	eventually(t, "report of the rule", func() bool {
		_, page := get(t, s, "/readyz")
		return strings.Contains(page, `[+]rule "/registry/secrets/" ok`) && strings.Contains(page, "[+]audit ok")
	})
	d.config(t, "kind: ", block, "writeWith: dev", "writeWith: plaintext")
	s.logged("would protect keys less")
	d.config(t, "kind: ", block, "rules:", "rulez-of-canary:")
	s.logged("not reloaded", "rulez-of-canary")
	d.config(t, "kind: ", block)
	s.signal(syscall.SIGHUP)
	s.logged("configuration reloaded", "SIGHUP")
	if _, page := get(t, s, "/metrics"); !strings.Contains(page, "etcd_kms_proxy_audit_lost_total 0") || !strings.Contains(page, "etcd_kms_proxy_audit_writable 1") {
		t.Error("the metrics of the audit log are missing")
	}
	s.signal(syscall.SIGTERM)
	s.exited(0)

	records := d.auditLog(t)
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
		"reason", `keys below "/registry/secrets/" would be written as plaintext: their values were sealed with "dev"`)
	find("event", "reload", "outcome", "failed", "reason", "1 problem(s), the first on line 11")
	find("event", "reload", "trigger", "SIGHUP", "outcome", "applied")
	for _, r := range records {
		if strings.Contains(strings.ToLower(r["hash"].(string)), "canary") || r["reason"] != nil && strings.Contains(r["reason"].(string), "canary") {
			t.Errorf("a reason quotes the file: %v", r)
		}
	}

	r := execute(t, "audit", "verify", d.path("audit.jsonl"), "--key-file", d.path("audit.key"))
	r.want(t, 0)
	last := records[len(records)-1]["hash"].(string)
	for _, text := range []string{"ok\n", "chain      keyed\n", "last hash  " + last} {
		if !strings.Contains(r.stdout, text) {
			t.Errorf("no %q in\n%s", text, r.stdout)
		}
	}
	execute(t, "audit", "verify", d.path("audit.jsonl")).want(t, 2, "error: ", "the chain is keyed", "hint: give the key with --key-file")

	// A second run goes on in the same chain.
	s = start(t, d.config(t, "kind: ", block))
	addressOf(t, s, "serving")
	s.signal(syscall.SIGTERM)
	s.exited(0)
	r = execute(t, "audit", "verify", d.path("audit.jsonl"), "--key-file", d.path("audit.key"), "--expect-last", last)
	r.want(t, 0)
	if !strings.Contains(r.stdout, "expected   there, with ") {
		t.Errorf("report:\n%s", r.stdout)
	}
}

func TestAuditBadInput(t *testing.T) {
	d := newDir(t)
	d.auditKey(t)
	if err := os.Chmod(d.path("audit.key"), 0o660); err != nil {
		t.Fatal(err)
	}
	path := d.config(t, "kind: ", "audit: {path: audit.jsonl, keyFile: audit.key}\nkind: ")
	execute(t, "config", "check", "--config", path).want(t, 1, "audit.keyFile: ", "chmod 600")
	execute(t, "serve", "--config", path).want(t, 3, "audit key ", "chmod 600")
	path = d.config(t, "kind: ", "audit: {path: key.yaml}\nkind: ")
	execute(t, "serve", "--config", path).want(t, 3, "key.yaml: it is not an audit log")
}

// runApp runs an app of this process until the test ends.
func runApp(t *testing.T, d dir, edits ...string) *app {
	t.Helper()
	path := d.config(t, edits...)
	c, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	log := slog.New(slog.DiscardHandler)
	a, err := newApp(c, log, serveOptions{drain: deadline})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(a.close)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	r := &reloader{path: path, seen: digest(path), inUse: digest(path), app: a, running: c, level: new(slog.LevelVar), log: log}
	go func() { ended <- a.run(ctx, r, nil, deadline) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return a
}

// TestAuditRequired: while the log cannot be written nothing is sealed, opened or asked of the KMS, and all comes back by itself.
func TestAuditRequired(t *testing.T) {
	d := newDir(t)
	a := runApp(t, d, "kind: ", "audit: {path: audit.jsonl, required: true}\nkind: ")
	ctx := context.Background()
	rule := a.rules.Load().forProxy()[0].Sealer
	stored, err := rule.Seal(ctx, []byte("k"), []byte("v"))
	if err != nil {
		t.Fatal(err)
	}
	refused := func(what string, out []byte, err error) {
		t.Helper()
		e, ok := errors.AsType[*proxy.SealError](err)
		if !ok || e.Code != codes.Unavailable || !strings.Contains(e.Text, "audit") || out != nil {
			t.Errorf("%s: %q, %v; want Unavailable for the audit log", what, out, err)
		}
	}
	unblock := d.block(t)
	a.audit.denied("listener", "client", "remote") // lost
	out, err := rule.Seal(ctx, []byte("k"), []byte("v"))
	refused("seal", out, err)
	out, err = rule.Open(ctx, []byte("k"), bytes.Clone(stored))
	refused("open", out, err)
	report := a.ready().String()
	for _, text := range []string{"[-]audit: the audit log cannot be written: ", `[-]rule "/registry/secrets/": the audit log`} {
		if !strings.Contains(report, text) {
			t.Errorf("no %q in\n%s", text, report)
		}
	}
	unblock()
	if out, err = rule.Open(ctx, []byte("k"), bytes.Clone(stored)); err != nil || string(out) != "v" {
		t.Errorf("after: %q, %v", out, err)
	}
	if report := a.ready().String(); !strings.Contains(report, "[+]audit ok") || strings.Contains(report, "[-]rule") {
		t.Errorf("after:\n%s", report)
	}
	if last := d.auditLog(t); last[len(last)-1]["event"] != "lost" || last[len(last)-1]["lost"] != 1.0 {
		t.Errorf("the log ends with %v", last[len(last)-1])
	}
}

// TestReloadIsHeldBack: what changes the rules is recorded, or does not happen.
func TestReloadIsHeldBack(t *testing.T) {
	d := newDir(t)
	a, r := newRunningIn(t, d, "kind: ", "audit: {path: audit.jsonl, required: true}\nkind: ")
	outcome := func(want string) {
		t.Helper()
		r.reload("test")
		if metrics := metricsOf(t, a); !strings.Contains(metrics, `etcd_kms_proxy_config_reloads_total{outcome="`+want+`"} 1`) {
			t.Errorf("the reload was not %s", want)
		}
	}
	unblock := d.block(t)
	a.audit.denied("listener", "client", "remote") // lost
	outcome(reloadFailed)
	unblock()
	outcome(reloadApplied)
	if n := len(d.auditLog(t)); n != 2 { // what was lost, and the reload
		t.Errorf("%d records", n)
	}
}

// TestReloadWaitsForTheAuditLog: a change that could not be recorded is applied once it can, without another change or a signal.
func TestReloadWaitsForTheAuditLog(t *testing.T) {
	d := newDir(t)
	a, r := newRunningIn(t, d, "kind: ", "audit: {path: audit.jsonl, required: true}\nkind: ")
	unblock := d.block(t)
	a.audit.denied("listener", "client", "remote") // lost
	d.config(t, "kind: ", "audit: {path: audit.jsonl, required: true}\nkind: ", "level: debug", "level: warn")
	if r.reload("test"); r.problem() == nil || r.problem().Error() != errAudit.Error() {
		t.Fatalf("the change is not held back: %v", r.problem())
	}
	unblock()
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); r.retry(ctx) }()
	for begun := time.Now(); r.problem() != nil && time.Since(begun) < deadline+auditRetry; {
		time.Sleep(10 * time.Millisecond)
	}
	stop()
	<-ended
	if r.problem() != nil || r.level.Level() != slog.LevelWarn {
		t.Errorf("the change is not applied: %v", r.problem())
	}
}

// TestAuditNotRequired: the proxy goes on, and says what was lost.
func TestAuditNotRequired(t *testing.T) {
	d := newDir(t)
	s := start(t, d.config(t, "kind: ", "audit: {path: audit.jsonl}\nkind: "))
	addressOf(t, s, "serving")
	unblock := d.block(t)
	s.signal(syscall.SIGHUP)
	s.signal(syscall.SIGHUP)
	s.logged("the audit log cannot be written: records are lost")
	eventually(t, "count of what is lost", func() bool {
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
	r := execute(t, "audit", "verify", d.path("audit.jsonl"))
	r.want(t, 0)
	if !strings.Contains(r.stdout, "could not be written\n") {
		t.Errorf("report:\n%s", r.stdout)
	}
}
