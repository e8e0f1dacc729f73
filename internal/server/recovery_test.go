package server

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
)

// runRings runs the keys of a server, and returns a function that stops them.
func runRings(t *testing.T, s *Server) func() {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	var all sync.WaitGroup
	all.Go(func() {
		if err := s.keys.Run(ctx); err != nil {
			t.Error(err)
		}
	})
	stop := func() { cancel(); all.Wait() }
	t.Cleanup(stop)
	return stop
}

// rulesOf starts an app on the folder's configuration with some edits and returns its first rule.
func rulesOf(t *testing.T, d clitest.Dir, edits ...string) (*Server, *rule.Sealer, func()) {
	t.Helper()
	a, _ := newRunningIn(t, d, edits...)
	stop := runRings(t, a)
	return a, a.keys.Rules().Sealers()[0], stop
}

func metricsOf(t *testing.T, a *Server) string {
	t.Helper()
	w := httptest.NewRecorder()
	promhttp.HandlerFor(a.registry, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
	body, err := io.ReadAll(w.Body)
	if err != nil {
		t.Fatal(err)
	}
	clitest.Told.Output(body)
	return string(body)
}

// metricValue returns the value of one metric, which must be there.
func metricValue(t *testing.T, a *Server, name string) (v float64) {
	t.Helper()
	_, after, ok := strings.Cut(metricsOf(t, a), "\n"+name+" ")
	if _, err := fmt.Sscan(after, &v); !ok || err != nil {
		t.Fatalf("no metric %s: %v", name, err)
	}
	return v
}

// checkOf returns the line of readyz with a name, as "ok" or its detail.
func checkOf(t *testing.T, a *Server, name string) string {
	t.Helper()
	for _, c := range a.ready().Checks {
		clitest.Told.Output([]byte(c.Detail))
		if c.Name == name {
			if c.OK {
				return "ok"
			}
			return c.Detail
		}
	}
	t.Fatalf("readyz has no %q", name)
	return ""
}

// loseVersion takes a version out of a key file for good, after another one was added.
func loseVersion(t *testing.T, path, id string) {
	t.Helper()
	clitest.NewKey(t, path)
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	line := regexp.MustCompile(`(?m)^- \{id: "?` + regexp.QuoteMeta(id) + `"?,.*\n`)
	if !line.Match(text) {
		t.Fatalf("the key file has no version %s", id)
	}
	if err := os.WriteFile(path, line.ReplaceAll(text, nil), 0o600); err != nil {
		t.Fatal(err)
	}
}

// replaceKey puts another key in the place of a key file, under the same id.
func replaceKey(t *testing.T, path, _ string) {
	t.Helper()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	clitest.NewKey(t, path)
}

// TestLocalKeyIsLost is the life of a cluster whose key is lost: values are sealed with a copy by a
// second key file, the first one loses the version they are under, everything still reads, and the
// rule moves to a new provider.
func TestLocalKeyIsLost(t *testing.T) {
	ctx, key, value := context.Background(), []byte("/registry/secrets/default/db"), []byte("correct-horse-battery-staple")
	for how, lose := range map[string]func(*testing.T, string, string){"version removed": loseVersion, "key replaced": replaceKey} {
		t.Run(how, func(t *testing.T) {
			d := clitest.NewDir(t)
			for _, name := range []string{"dr.yaml", "new.yaml"} {
				clitest.NewKey(t, d.Path(name))
				t.Cleanup(func() { clitest.Told.KeyFile(t, d.Path(name)) })
			}
			withDR := []string{"kind: ", "audit: {path: audit.jsonl}\nkind: ", "rules:\n", "- {name: dr, local: {keyFile: dr.yaml}}\nrules:\n", "writeWith: dev", "writeWith: dev\n  recovery: [dr]\n  recoveryRequired: true"}
			a, rule, stop := rulesOf(t, d, withDR...)
			stored, err := rule.Seal(ctx, key, value)
			if err != nil {
				t.Fatal(err)
			}
			if got := checkOf(t, a, "recovery of dev by dr"); got != "ok" {
				t.Errorf("readyz: %s", got)
			}
			for _, line := range []string{
				`etcd_kms_proxy_recovery_uses_total{provider="dev",recovery_provider="dr"} 0`,
				`etcd_kms_proxy_recovery_missing{provider="dev",recovery_provider="dr"} 0`,
			} {
				if !strings.Contains(metricsOf(t, a), line) {
					t.Errorf("no metric %s", line)
				}
			}
			stop()
			a.Close()

			clitest.Told.KeyFile(t, d.Path("key.yaml"))
			lose(t, d.Path("key.yaml"), "1")
			a, rule, stop = rulesOf(t, d, withDR...)
			plaintext, state, err := rule.Inspect(ctx, key, stored)
			if err != nil || state != keyring.Stale || !bytes.Equal(plaintext, value) {
				t.Fatalf("%q is %v, %v", plaintext, state, err)
			}
			if got := checkOf(t, a, "recovery of dev by dr"); !strings.HasPrefix(got, "in use: ") {
				t.Errorf("readyz: %s", got)
			}
			if line := `etcd_kms_proxy_recovery_uses_total{provider="dev",recovery_provider="dr"} 1`; !strings.Contains(metricsOf(t, a), line) {
				t.Errorf("no metric %s", line)
			}
			stop()
			a.Close()
			var uses []string
			for _, r := range d.AuditLog(t) {
				if r["event"] == "recovery" {
					uses = append(uses, fmt.Sprint(r["primary"], " by ", r["provider"], " ", r["keyID"], ": ", r["reason"]))
				}
			}
			if len(uses) != 1 || !strings.HasPrefix(uses[0], `dev by dr 1: KMS provider "dev"`) {
				t.Errorf("the audit log tells of %q", uses)
			}

			a, rule, stop = rulesOf(t, d, "rules:\n", "- {name: dr, local: {keyFile: dr.yaml}}\n- {name: new, local: {keyFile: new.yaml}}\nrules:\n",
				"writeWith: dev", "writeWith: new\n  readWith: [dev]\n  recovery: [dr]")
			plaintext, state, err = rule.Inspect(ctx, key, stored)
			if err != nil || state != keyring.Stale || !bytes.Equal(plaintext, value) {
				t.Fatalf("%q is %v, %v", plaintext, state, err)
			}
			again, err := rule.Seal(ctx, key, plaintext)
			if err != nil || !bytes.HasPrefix(again, []byte("k8s:enc:kms:v2:new:")) {
				t.Fatalf("%q, %v", again, err)
			}
			if _, state, err := rule.Inspect(ctx, key, again); state != keyring.Current || err != nil {
				t.Errorf("the rewritten value is %v, %v", state, err)
			}
			stop()
			a.Close()
		})
	}
}

// TestReloadChangesRecovery: a rule gets a recovery provider without a restart, one that does not
// wrap yet.
func TestReloadChangesRecovery(t *testing.T) {
	ctx, key := context.Background(), []byte("/registry/secrets/default/db")
	d := clitest.NewDir(t)
	withDR := []string{"rules:\n", "- {name: dr, plugin: {endpoint: 'unix://" + d.Path("none.sock") + "', timeout: 100ms}}\nrules:\n"}
	a, r := newRunningIn(t, d, withDR...)
	runRings(t, a)
	sealed := func() []byte {
		stored, err := a.keys.Rules().Sealers()[0].Seal(ctx, key, []byte("v"))
		if err != nil {
			t.Fatal(err)
		}
		return stored
	}
	sealed()
	d.Config(t, append(withDR, "writeWith: dev", "writeWith: dev\n  recovery: [dr]")...)
	r.reload("test")
	clitest.Eventually(t, "alarm", func() bool {
		return strings.Contains(metricsOf(t, a), `etcd_kms_proxy_recovery_missing{provider="dev",recovery_provider="dr"} 1`)
	})
	if got := checkOf(t, a, "recovery of dev by dr"); !strings.HasPrefix(got, "values are encrypted without it: ") {
		t.Errorf("readyz: %s", got)
	}
	stored := sealed()
	if _, state, err := a.keys.Rules().Sealers()[0].Inspect(ctx, key, stored); state != keyring.Stale || err != nil {
		t.Errorf("a value without its copy is %v, %v", state, err)
	}
	d.Config(t, withDR...)
	r.reload("test")
	clitest.Eventually(t, "end of the alarm", func() bool { return !strings.Contains(metricsOf(t, a), "etcd_kms_proxy_recovery_missing{") })
}
