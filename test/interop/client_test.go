package interop

import (
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	kmsplugin "github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/plugin"
)

// newClient returns the product's client of a plugin, inside the wrapper that all backends share.
func newClient(tb testing.TB, p *plugin, provider string) kmsclient.Service {
	tb.Helper()
	backend, err := kmsplugin.New(kmsplugin.Config{Endpoint: p.endpoint})
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { backend.Close() })
	c, err := kmsclient.New(kmsclient.Config{Name: provider, Backend: backend, Timeout: 10 * time.Second})
	if err != nil {
		tb.Fatal(err)
	}
	return c
}
