package proxy

import (
	"crypto/tls"
	"crypto/x509"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

// The values of the label use of etcd_kms_proxy_certificate_expiry_timestamp_seconds.
const (
	useListener         = "listener"           // a listener's own certificate
	useListenerClientCA = "listener_client_ca" // the CAs of a listener's clients
	useEtcdClient       = "etcd_client"        // the client certificate for etcd
	useEtcdCA           = "etcd_ca"            // the CAs of etcd's certificates
)

// certificate says when what a file holds expires.
type certificate struct {
	use      string
	notAfter time.Time
}

// chainExpiry is that of a certificate with its intermediates: the first of them to expire counts.
func chainExpiry(use string, cert tls.Certificate) certificate {
	c := certificate{use: use}
	for _, der := range cert.Certificate {
		parsed, err := x509.ParseCertificate(der)
		if err != nil {
			continue // tls.LoadX509KeyPair has parsed the leaf; peers decide about the others
		}
		if c.notAfter.IsZero() || parsed.NotAfter.Before(c.notAfter) {
			c.notAfter = parsed.NotAfter
		}
	}
	return c
}

// caExpiry is that of a file of CA certificates: the last of them to expire counts. While a CA is
// replaced the file holds the old one and the new one, and a bundle may hold any number of others.
func caExpiry(use string, cas []*x509.Certificate) certificate {
	c := certificate{use: use}
	for _, ca := range cas {
		if ca.NotAfter.After(c.notAfter) {
			c.notAfter = ca.NotAfter
		}
	}
	return c
}

// certificateExpiry shows when the certificates of the listeners and of the connection to etcd
// expire. Files that have changed are read when the metrics are.
type certificateExpiry struct {
	listeners []*listener
	etcd      *upstreamCredentials // nil without TLS
}

var certificateExpiryDesc = prometheus.NewDesc("etcd_kms_proxy_certificate_expiry_timestamp_seconds",
	"Unix time when a certificate of the TLS files in use expires.", []string{"use", "listener"}, nil)

// Describe implements [prometheus.Collector].
func (*certificateExpiry) Describe(ch chan<- *prometheus.Desc) { ch <- certificateExpiryDesc }

// Collect implements [prometheus.Collector].
func (e *certificateExpiry) Collect(ch chan<- prometheus.Metric) {
	first := make(map[[2]string]time.Time) // addresses with port 0 may be the same
	add := func(address string, certs []certificate) {
		for _, c := range certs {
			labels := [2]string{c.use, address}
			if at, ok := first[labels]; !ok || c.notAfter.Before(at) {
				first[labels] = c.notAfter
			}
		}
	}
	for _, l := range e.listeners {
		if l.tls != nil {
			add(l.cfg.Address, l.tls.certificates())
		}
	}
	if e.etcd != nil {
		add("", e.etcd.files.certificates())
	}
	for labels, at := range first {
		ch <- prometheus.MustNewConstMetric(certificateExpiryDesc, prometheus.GaugeValue, float64(at.Unix()), labels[0], labels[1])
	}
}
