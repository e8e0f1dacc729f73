package proxy

import (
	"log/slog"
	"net"
	"path/filepath"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// TestTLSOverASocket: etcd's client library verifies such an endpoint against the name of the socket, and so does the proxy, for relayed and handled calls.
func TestTLSOverASocket(t *testing.T) {
	ca := newAuthority(t, "ca")
	cert, key, _ := ca.issue("etcd", "etcd", "etcd.sock")
	serverTLS, err := (&ListenerTLS{CertFile: cert, KeyFile: key}).serverTLS(nil, "")
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "etcd.sock"))
	if err != nil {
		t.Fatal(err)
	}
	serveFakeOn(t, echoEtcd(), l, grpc.Creds(credentials.NewTLS(serverTLS.Get())))
	cfg := UpstreamConfig{Endpoints: []string{"unix://" + l.Addr().String()}, TLS: &UpstreamTLS{CAFile: ca.file}}
	bothWays(t, func(t *testing.T, startProxy starter) {
		conn := startProxy(t, "", nil, func(c *Config) { c.Upstream = cfg }).dial(t)
		if _, err := pb.NewKVClient(conn).Range(testContext(t), &pb.RangeRequest{Key: []byte("k")}); err != nil {
			t.Error(err)
		}
	})
	u, err := newUpstream(cfg, slog.New(slog.DiscardHandler), nil)
	if err != nil {
		t.Fatal(err)
	}
	defer u.close()
	conn, _, err := u.dialEndpoint(testContext(t), cfg.Endpoints[0], protocolHTTP2)
	if err != nil {
		t.Fatal(err)
	}
	conn.Close()
}
