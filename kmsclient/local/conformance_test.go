package local

import (
	"path/filepath"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

func TestConformance(t *testing.T) {
	kmstest.Conformance(t, newService)
	kmstest.ConformanceUnderFaults(t, newService)
}

func newService(t *testing.T) kmsclient.Service {
	path := filepath.Join(t.TempDir(), "key.yaml")
	if err := NewKeyFile(path); err != nil {
		t.Fatal(err)
	}
	if err := AddVersion(path); err != nil { // the key that wraps is not the only one
		t.Fatal(err)
	}
	k, err := New(Config{KeyFile: path})
	if err != nil {
		t.Fatal(err)
	}
	return k
}
