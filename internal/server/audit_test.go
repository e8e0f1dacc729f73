package server

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

// runServer runs a server of this process until the test ends.
func runServer(t *testing.T, d clitest.Dir, edits ...string) *Server {
	t.Helper()
	s, _ := newRunningIn(t, d, edits...)
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx, nil) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return s
}

// TestAuditRequired: while the log cannot be written nothing is sealed, opened or asked of the KMS,
// and all comes back by itself.
func TestAuditRequired(t *testing.T) {
	d := clitest.NewDir(t)
	a := runServer(t, d, "kind: ", "audit: {path: audit.jsonl, required: true}\nkind: ")
	ctx := context.Background()
	rule := a.keys.Rules().ForProxy()[0].Sealer
	stored, err := rule.Seal(ctx, []byte{}, []byte("k"), []byte("v"))
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
	unblock := d.Block(t)
	a.denied("listener", "client", "remote") // lost
	out, err := rule.Seal(ctx, []byte{}, []byte("k"), []byte("v"))
	refused("seal", out, err)
	out, err = rule.Open(ctx, nil, []byte("k"), bytes.Clone(stored))
	refused("open", out, err)
	report := a.ready().String()
	for _, text := range []string{"[-]audit: the audit log cannot be written: ", `[-]rule "/registry/secrets/": the audit log`} {
		if !strings.Contains(report, text) {
			t.Errorf("no %q in\n%s", text, report)
		}
	}
	// Its next health check is not made, which is not the fault of the KMS.
	a.keys.CheckNow()
	const notCalled = "[-]kms dev: the KMS was not called: the audit log cannot be written, and audit.required is set"
	for begun := time.Now(); !strings.Contains(a.ready().String(), notCalled); time.Sleep(time.Millisecond) {
		if time.Since(begun) > 20*time.Second {
			t.Fatalf("no %q in\n%s", notCalled, a.ready())
		}
	}
	unblock()
	if out, err = rule.Open(ctx, nil, []byte("k"), bytes.Clone(stored)); err != nil || string(out) != "v" {
		t.Errorf("after: %q, %v", out, err)
	}
	if report := a.ready().String(); !strings.Contains(report, "[+]audit ok") || strings.Contains(report, "[-]rule") {
		t.Errorf("after:\n%s", report)
	}
	if last := d.AuditLog(t); last[len(last)-1]["event"] != "lost" || last[len(last)-1]["lost"] != 1.0 {
		t.Errorf("the log ends with %v", last[len(last)-1])
	}
}

// TestReloadIsHeldBack: what changes the rules is recorded, or does not happen.
func TestReloadIsHeldBack(t *testing.T) {
	d := clitest.NewDir(t)
	a, r := newRunningIn(t, d, "kind: ", "audit: {path: audit.jsonl, required: true}\nkind: ")
	outcome := func(want string) {
		t.Helper()
		r.reload("test")
		if metrics := metricsOf(t, a); !strings.Contains(metrics, `etcd_kms_proxy_config_reloads_total{outcome="`+want+`"} 1`) {
			t.Errorf("the reload was not %s", want)
		}
	}
	unblock := d.Block(t)
	a.denied("listener", "client", "remote") // lost
	outcome(reloadFailed)
	unblock()
	outcome(reloadApplied)
	if n := len(d.AuditLog(t)); n != 2 { // what was lost, and the reload
		t.Errorf("%d records", n)
	}
}

// TestReloadWaitsForTheAuditLog: a change that could not be recorded is applied once it can be,
// without another change or a signal.
func TestReloadWaitsForTheAuditLog(t *testing.T) {
	d := clitest.NewDir(t)
	a, r := newRunningIn(t, d, "kind: ", "audit: {path: audit.jsonl, required: true}\nkind: ")
	unblock := d.Block(t)
	a.denied("listener", "client", "remote") // lost
	d.Config(t, "kind: ", "audit: {path: audit.jsonl, required: true}\nkind: ", "level: debug", "level: warn")
	if r.reload("test"); r.problem() == nil || r.problem().Error() != auditlog.ErrUnwritable.Error() {
		t.Fatalf("the change is not held back: %v", r.problem())
	}
	unblock()
	ctx, stop := context.WithCancel(t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); r.retry(ctx) }()
	for begun := time.Now(); r.problem() != nil && time.Since(begun) < 20*time.Second+auditRetry; {
		time.Sleep(10 * time.Millisecond)
	}
	stop()
	<-ended
	if r.problem() != nil || r.level.Level() != slog.LevelWarn {
		t.Errorf("the change is not applied: %v", r.problem())
	}
}
