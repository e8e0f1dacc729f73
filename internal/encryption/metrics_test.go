package encryption

import (
	"testing"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
)

// TestLabelsOfBytes: prefixes that are not UTF-8 have labels of their own.
func TestLabelsOfBytes(t *testing.T) {
	cache, err := keyring.NewCache(keyring.CacheConfig{})
	if err != nil {
		t.Fatal(err)
	}
	m := newMetrics(prometheus.NewRegistry(), &Keys{}, cache)
	for _, prefix := range []string{"\xfe", "\xffA", "\ufffd", ""} {
		m.forRule(prefix)
	}
	if _, err := m.encrypted.GetMetricWithLabelValues(`\xffA`, "ok"); err != nil || printable.UTF8("größe") != "größe" {
		t.Errorf("labels: %v", err)
	}
}
