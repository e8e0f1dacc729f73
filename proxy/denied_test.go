package proxy

import (
	"crypto/tls"
	"crypto/x509"
	"strings"
	"testing"

	"golang.org/x/net/http2/hpack"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// TestDeniedIsAnsweredFromItsHeader: a client that is not allowed gets its response, of gRPC and
// over HTTP, while nothing of the body of its request has arrived, and nothing waits for that.
func TestDeniedIsAnsweredFromItsHeader(t *testing.T) {
	ca := proxytest.NewAuthority(t, "ca")
	cert, key, _ := ca.Issue("server", "server")
	p := startProxy(t, proxytest.ServeStore(t), everything, func(c *Config) {
		c.Listeners[0].TLS = &listener.TLS{CertFile: cert, KeyFile: key, ClientCAFile: ca.File}
		c.Listeners[0].AllowedClients = []string{"friend"}
	})
	c, k, _ := ca.Issue("other", "other")
	pair, err := tls.LoadX509KeyPair(c, k)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(ca.Cert)
	conn, err := tls.Dial("tcp", p.Addrs()[0].String(), &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, NextProtos: []string{"h2"}})
	if err != nil {
		t.Fatal(err)
	}
	talker := proxytest.NewTalkerOn(t, conn)
	request := func(path, kind string) proxytest.Attempt {
		return proxytest.Attempt{Open: true, Fields: []hpack.HeaderField{
			{Name: ":method", Value: "POST"}, {Name: ":scheme", Value: "https"}, {Name: ":path", Value: path}, {Name: ":authority", Value: "localhost"},
			{Name: "content-type", Value: kind}, {Name: "te", Value: "trailers"},
		}}
	}
	for _, m := range etcdapi.MethodTable() {
		if got := talker.Try(t, request(m.Path, rpc.ContentType)); len(got.Data) > 0 || !strings.Contains(strings.Join(got.Trailer, " "), "grpc-status: 7") {
			t.Errorf("%s: %v", m.Path, got)
		}
	}
	for path, want := range map[string]string{"/v3/kv/range": `{"code":7`, "/health": "client is not allowed here"} {
		if got := talker.Try(t, request(path, "application/json")); !strings.Contains(string(got.Data), want) {
			t.Errorf("%s: %q %v", path, got.Data, got)
		}
	}
}
