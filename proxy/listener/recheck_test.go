package listener

import (
	"crypto/x509"
	"errors"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/metrics"
)

// TestAdmitLate: a connection that was identified by files of before is checked by those of now,
// before it is served.
func TestAdmitLate(t *testing.T) {
	ca := proxytest.NewAuthority(t, "ca")
	cert, key, _ := ca.Issue("server", "server")
	crl := filepath.Join(ca.Dir, "crl.pem")
	ca.Revoke(crl)
	m, err := metrics.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{
		Address: "127.0.0.1:0", TLS: &TLS{CertFile: cert, KeyFile: key, ClientCAFile: ca.File, ClientCRLFile: crl},
		AllowedClients: []string{"stays", "goes"},
	}
	l, err := Listen(cfg, slog.New(slog.DiscardHandler), m)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, _, leaf := ca.Issue("goes", "goes")
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	c := &Conn{Conn: far, Identity: &Identity{CommonName: "goes"}, certs: []*x509.Certificate{leaf}, expires: leaf.NotAfter}
	by := l.criteria()
	if err := l.admit(c, by); err != nil {
		t.Fatal(err)
	}
	l.forget(c)
	if err := l.SetClients([]string{"stays"}, nil); err != nil {
		t.Fatal(err)
	}
	if err := l.admit(c, by); !errors.Is(err, errOtherLists) {
		t.Errorf("after its name has left the list: %v", err)
	}
	by = l.criteria()
	ca.Revoke(crl, leaf)
	if err := l.admit(c, by); err == nil || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("after it was revoked: %v", err)
	}
	if len(l.conns.all) != 0 {
		t.Error("it is kept")
	}
}
