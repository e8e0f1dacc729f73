package testserver

import (
	"net/url"
	"os"
	"path/filepath"
	"testing"

	"go.etcd.io/etcd/server/v3/embed"
	"k8s.io/apiserver/pkg/storage/etcd3/testserver/front"
)

// putInFront has etcd listen on a socket. It returns a function that starts a proxy at etcd's
// client URL, when etcd is ready.
func putInFront(t testing.TB, cfg *embed.Config) func() {
	t.Helper()
	dir, err := os.MkdirTemp("", "f")
	if err != nil {
		t.Fatal(err)
	}
	c := front.Config{Name: t.Name(), Dir: dir, Endpoint: filepath.Join(dir, "etcd"), MaxRequestBytes: int(cfg.MaxRequestBytes)}
	l := front.Listener{Network: "tcp", Address: cfg.ListenClientUrls[0].Host}
	if cfg.ListenClientUrls[0].Scheme == "https" {
		i := cfg.ClientTLSInfo
		l.CertFile, l.KeyFile, l.ClientCAFile, l.ClientCRLFile = i.CertFile, i.KeyFile, i.TrustedCAFile, i.CRLFile
	}
	c.Listeners = []front.Listener{l}
	cfg.ListenClientUrls = []url.URL{{Scheme: "unix", Path: c.Endpoint}}
	cfg.MaxRequestBytes += front.Overhead
	t.Cleanup(func() {
		if err := front.Check(c.Name, cfg.Dir); err != nil {
			t.Log("read etcd's file:", err)
		}
	})
	return func() {
		proxy, err := front.Start(c)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(proxy.Stop)
		if err := proxy.Serves(); err != nil {
			t.Fatal(err)
		}
	}
}
