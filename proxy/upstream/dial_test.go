package upstream

import (
	"crypto/tls"
	"log/slog"
	"net"
	"path/filepath"
	"testing"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/tlsfiles"
)

// TestDialTLSOverASocket: an endpoint that is a socket is verified against the name of the socket.
func TestDialTLSOverASocket(t *testing.T) {
	ca := proxytest.NewAuthority(t, "ca")
	cert, key, _ := ca.Issue("etcd", "etcd", "etcd.sock")
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "etcd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	proxytest.ServeFakeOn(t, proxytest.EchoEtcd(), l, grpc.Creds(credentials.NewServerTLSFromCert(&pair)))
	cfg := Config{Endpoints: []string{"unix://" + l.Addr().String()}, TLS: &TLS{CAFile: ca.File}}
	u, err := New(cfg, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer u.Close()
	conn, _, err := u.DialEndpoint(t.Context(), cfg.Endpoints[0], tlsfiles.ProtocolHTTP2)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}
