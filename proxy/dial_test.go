package proxy

import (
	"crypto/tls"
	"net"
	"path/filepath"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// TestTLSOverASocket: etcd's client library verifies such an endpoint against the name of the
// socket, and so does the proxy, for relayed and handled calls.
func TestTLSOverASocket(t *testing.T) {
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
	cfg := upstream.Config{Endpoints: []string{"unix://" + l.Addr().String()}, TLS: &upstream.TLS{CAFile: ca.File}}
	bothWays(t, func(t *testing.T, startProxy starter) {
		conn := startProxy(t, "", nil, func(c *Config) { c.Upstream = cfg }).dial(t)
		if _, err := pb.NewKVClient(conn).Range(proxytest.TestContext(t), &pb.RangeRequest{Key: []byte("k")}); err != nil {
			t.Error(err)
		}
	})
}
