package provider

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// TestExemplars: the KMS' ID of a call is the exemplar of its latency, unless it cannot be one.
func TestExemplars(t *testing.T) {
	registry := prometheus.NewRegistry()
	m := NewCallMetrics(registry)
	for _, id := range []string{"", "good-id", "\xff", strings.Repeat("x", 200)} {
		m.Observe(kmsclient.Call{Provider: "ack", Op: "Encrypt", Class: "ok", Duration: 3 * time.Millisecond, RequestID: id})
	}
	w, request := httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/metrics", nil)
	request.Header.Set("Accept", "application/openmetrics-text")
	promhttp.HandlerFor(registry, promhttp.HandlerOpts{EnableOpenMetrics: true}).ServeHTTP(w, request)
	page := w.Body.String()
	if strings.Count(page, "request_id") != 1 || !strings.Contains(page, `{request_id="good-id"} 0.003`) {
		t.Errorf("the exemplars are not those of good-id alone:\n%s", page)
	}
	if !strings.Contains(page, `etcd_kms_proxy_kms_operation_duration_seconds_count{class="ok",operation="Encrypt",provider="ack"} 4`) {
		t.Error("a call is not counted")
	}
}
