package cli

import (
	"strings"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/pluginserver"
)

// pluginState collects a plugin server's state when it is asked for.
type pluginState struct{ server *pluginserver.Server }

// Describe implements [prometheus.Collector].
func (pluginState) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{healthyDesc, lastGoodDesc, keyDesc} {
		ch <- d
	}
}

// Collect implements [prometheus.Collector].
func (p pluginState) Collect(ch chan<- prometheus.Metric) {
	s := p.server.State()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, append([]string{s.Provider}, labels...)...)
	}
	healthy := 0.0
	if s.Healthy {
		healthy = 1
	}
	gauge(healthyDesc, healthy)
	if !s.LastGood.IsZero() {
		gauge(lastGoodDesc, float64(s.LastGood.UnixNano())/1e9)
	}
	if s.KeyID != "" {
		gauge(keyDesc, 1, strings.ToValidUTF8(s.KeyID, "\ufffd")) // the KMS' text, whatever it is
	}
}
