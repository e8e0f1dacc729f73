package cli

import (
	"net/http"
	"net/http/httptest"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// TestCountersBeginAtZero: an increase from a counter that was not there is none to Prometheus, so
// the counters of each rule are there before the first event, also those of rules that a reload adds.
func TestCountersBeginAtZero(t *testing.T) {
	a, r := newRunning(t)
	expect := func(rules ...string) {
		t.Helper()
		page := metricsOf(t, a)
		for _, rule := range rules {
			for _, series := range []string{
				`etcd_kms_proxy_plaintext_writes_seen_total{rule="` + rule + `"} 0`,
				`etcd_kms_proxy_values_opened_total{outcome="corrupt",rule="` + rule + `"} 0`,
				`etcd_kms_proxy_values_sealed_total{outcome="unavailable",rule="` + rule + `"} 0`,
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
	a, _ := newRunning(t, withRecovery()...)
	for _, labels := range []string{`provider="dev",recovery_provider="dr"`, `provider="dr",recovery_provider="dev"`} {
		if series := "etcd_kms_proxy_recovery_uses_total{" + labels + "} 0"; !strings.Contains(metricsOf(t, a), "\n"+series+"\n") {
			t.Errorf("there is no %s", series)
		}
	}
}

// TestExemplars: the KMS' ID of a call is the exemplar of its latency, unless it cannot be one.
func TestExemplars(t *testing.T) {
	a, _ := newRunning(t)
	m := a.metrics
	for _, id := range []string{"", "good-id", "\xff", strings.Repeat("x", 200)} {
		m.kmsCall(kmsclient.Call{Provider: "ack", Op: "Encrypt", Class: "ok", Duration: 3 * time.Millisecond, RequestID: id})
	}
	w, request := httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/metrics", nil)
	request.Header.Set("Accept", "application/openmetrics-text")
	promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{EnableOpenMetrics: true}).ServeHTTP(w, request)
	page := w.Body.String()
	told.output([]byte(page))
	if strings.Count(page, "request_id") != 1 || !strings.Contains(page, `{request_id="good-id"} 0.003`) {
		t.Errorf("the exemplars are not those of good-id alone:\n%s", page)
	}
	if !strings.Contains(page, `etcd_kms_proxy_kms_operation_duration_seconds_count{class="ok",operation="Encrypt",provider="ack"} 4`) {
		t.Error("a call is not counted")
	}
}
