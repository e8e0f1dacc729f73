package alibaba

import (
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

// TestConformance runs the suite of all backends on keys that are named in different ways, and on a
// dedicated instance. A ciphertext names its key, so that damage there is an unknown key to the
// KMS.
func TestConformance(t *testing.T) {
	for name, c := range map[string]struct {
		double kmsdouble.Config
		change func(*Config)
	}{
		"key":       {},
		"alias":     {change: func(c *Config) { c.KeyID = kmsdouble.DefaultAlias }},
		"context":   {change: func(c *Config) { c.EncryptionContext = map[string]string{"cluster": "c1"} }},
		"hardware":  {double: kmsdouble.Config{Keys: []kmsdouble.KeyConfig{{ID: kmsdouble.DefaultKeyID, HSM: true}}}},
		"dedicated": {double: kmsdouble.Config{Dedicated: true}},
	} {
		t.Run(name, func(t *testing.T) {
			service := func(t *testing.T) kmsclient.Service {
				d := kmsdouble.New(t, c.double)
				d.Rotate(kmsdouble.DefaultKeyID)
				return newBackend(t, d, c.change)
			}
			damaged := kmstest.DamagedClasses(kmsclient.ClassInvalid, kmsclient.ClassKeyUnusable)
			kmstest.Conformance(t, service, damaged)
			if name == "context" || name == "dedicated" {
				kmstest.ConformanceUnderFaults(t, service, damaged)
			}
		})
	}
}
