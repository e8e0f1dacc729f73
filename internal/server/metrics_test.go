package server

import (
	"os"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
)

// TestCountersBeginAtZero: an increase from a counter that was not there is none to Prometheus, so
// the counters of each rule are there before the first event, also those of rules that a reload
// adds.
func TestCountersBeginAtZero(t *testing.T) {
	a, r := newRunning(t)
	expect := func(rules ...string) {
		t.Helper()
		page := metricsOf(t, a)
		for _, rule := range rules {
			for _, series := range []string{
				`etcd_kms_proxy_plaintext_writes_seen_total{rule="` + rule + `"} 0`,
				`etcd_kms_proxy_values_decrypted_total{outcome="corrupt",rule="` + rule + `"} 0`,
				`etcd_kms_proxy_values_encrypted_total{outcome="unavailable",rule="` + rule + `"} 0`,
			} {
				if !strings.Contains(page, "\n"+series+"\n") {
					t.Errorf("there is no %s", series)
				}
			}
		}
	}
	expect("/registry/secrets/")
	before, err := os.ReadFile(r.path)
	if err != nil {
		t.Fatal(err)
	}
	after := strings.Replace(string(before), "rules:", "rules:\n- {prefix: /registry/configmaps/, writeWith: dev, allowPlaintextReads: true}", 1)
	if err := os.WriteFile(r.path, []byte(after), 0o600); err != nil {
		t.Fatal(err)
	}
	r.reload("test")
	expect("/registry/secrets/", "/registry/configmaps/")
}

// TestRecoveryCountersBeginAtZero: any provider of a rule may open what another one cannot.
func TestRecoveryCountersBeginAtZero(t *testing.T) {
	a, _ := newRunning(t, clitest.WithRecovery()...)
	for _, labels := range []string{`provider="dev",recovery_provider="dr"`, `provider="dr",recovery_provider="dev"`} {
		if series := "etcd_kms_proxy_recovery_uses_total{" + labels + "} 0"; !strings.Contains(metricsOf(t, a), "\n"+series+"\n") {
			t.Errorf("there is no %s", series)
		}
	}
}
