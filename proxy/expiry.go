package proxy

import (
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/tlsfiles"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// certificateExpiry shows when the certificates of the listeners and of the connection to etcd
// expire. Files that have changed are read when the metrics are.
type certificateExpiry struct {
	listeners []*listener.Listener
	etcd      *upstream.Credentials // nil without TLS
}

var certificateExpiryDesc = prometheus.NewDesc("etcd_kms_proxy_certificate_expiry_timestamp_seconds",
	"Unix time when a certificate in use expires. use: listener (with its intermediates, the first to expire), listener_client_ca, etcd_client, etcd_ca (of several CAs, the last to expire). listener is empty for etcd_client and etcd_ca.", []string{"use", "listener"}, nil)

// Describe implements [prometheus.Collector].
func (*certificateExpiry) Describe(ch chan<- *prometheus.Desc) { ch <- certificateExpiryDesc }

// Collect implements [prometheus.Collector].
func (e *certificateExpiry) Collect(ch chan<- prometheus.Metric) {
	first := make(map[[2]string]time.Time) // addresses with port 0 may be the same
	add := func(address string, certs []tlsfiles.Certificate) {
		for _, c := range certs {
			labels := [2]string{c.Use, address}
			if at, ok := first[labels]; !ok || c.NotAfter.Before(at) {
				first[labels] = c.NotAfter
			}
		}
	}
	for _, l := range e.listeners {
		if l.TLS != nil {
			add(l.Config.Address, l.TLS.Certificates())
		}
	}
	if e.etcd != nil {
		add("", e.etcd.Files.Certificates())
	}
	for labels, at := range first {
		ch <- prometheus.MustNewConstMetric(certificateExpiryDesc, prometheus.GaugeValue, float64(at.Unix()), labels[0], labels[1])
	}
}
