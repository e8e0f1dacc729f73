package provider

import (
	"strings"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// CallMetrics count the calls of KMSs.
type CallMetrics struct {
	operations *prometheus.CounterVec
	latency    *prometheus.HistogramVec
}

// NewCallMetrics registers the metrics with reg.
func NewCallMetrics(reg prometheus.Registerer) *CallMetrics {
	labels := []string{"provider", "operation", "class"}
	m := &CallMetrics{
		operations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "etcd_kms_proxy_kms_operations_total", Help: "Attempts at the KMS. class is ok or that of the error: unavailable, denied, key_unusable, invalid, contract.",
		}, labels),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "etcd_kms_proxy_kms_operation_duration_seconds", Help: "Duration of the attempts at the KMS. Exemplars have the KMS' ID of the call, if it gives one.",
			Buckets:                     []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100, NativeHistogramMinResetDuration: time.Hour,
		}, labels),
	}
	reg.MustRegister(m.operations, m.latency)
	return m
}

// exemplarLabel is the label of exemplars that holds the KMS' own ID of a call.
const exemplarLabel = "request_id"

// Observe counts one call. It is the Observer of a [kmsclient.Client].
func (m *CallMetrics) Observe(c kmsclient.Call) {
	m.operations.WithLabelValues(c.Provider, c.Op, c.Class).Inc()
	histogram, seconds := m.latency.WithLabelValues(c.Provider, c.Op, c.Class), c.Duration.Seconds()
	if with, ok := histogram.(prometheus.ExemplarObserver); ok && isExemplar(c.RequestID) {
		with.ObserveWithExemplar(seconds, prometheus.Labels{exemplarLabel: c.RequestID})
		return
	}
	histogram.Observe(seconds)
}

// isExemplar reports whether the KMS' ID of a call, which may be any text, can be an exemplar.
func isExemplar(requestID string) bool {
	return requestID != "" && utf8.ValidString(requestID) && utf8.RuneCountInString(exemplarLabel+requestID) <= prometheus.ExemplarMaxRunes
}

// State is what the metrics of a provider show.
type State struct {
	Provider    string
	Healthy     bool
	LastSuccess time.Time
	KeyID       string
}

// States exports the state of providers. It implements [prometheus.Collector].
type States func() []State

var (
	healthyDesc     = prometheus.NewDesc("etcd_kms_proxy_kms_healthy", "1 if the last health check of the KMS succeeded.", []string{"provider"}, nil)
	lastSuccessDesc = prometheus.NewDesc("etcd_kms_proxy_kms_last_success_timestamp_seconds", "Unix time of the last successful health check of the KMS.", []string{"provider"}, nil)
	keyDesc         = prometheus.NewDesc("etcd_kms_proxy_kms_key_info", "Always 1; the current KMS key.", []string{"provider", "key_id"}, nil)
)

// Describe implements [prometheus.Collector].
func (States) Describe(ch chan<- *prometheus.Desc) {
	ch <- healthyDesc
	ch <- lastSuccessDesc
	ch <- keyDesc
}

// Collect implements [prometheus.Collector].
func (all States) Collect(ch chan<- prometheus.Metric) {
	for _, s := range all() {
		healthy := 0.0
		if s.Healthy {
			healthy = 1
		}
		ch <- gauge(healthyDesc, healthy, s.Provider)
		timestamp(ch, lastSuccessDesc, s.LastSuccess, s.Provider)
		if s.KeyID != "" {
			// any text of the KMS
			ch <- gauge(keyDesc, 1, s.Provider, strings.ToValidUTF8(s.KeyID, "\ufffd"))
		}
	}
}

func gauge(d *prometheus.Desc, v float64, labels ...string) prometheus.Metric {
	return prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
}

// timestamp exports t, unless it is zero.
func timestamp(ch chan<- prometheus.Metric, d *prometheus.Desc, t time.Time, labels ...string) {
	if !t.IsZero() {
		ch <- gauge(d, float64(t.UnixNano())/1e9, labels...)
	}
}
