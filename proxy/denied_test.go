package proxy

import (
	"crypto/tls"
	"crypto/x509"
	"net"
	"strings"
	"sync/atomic"
	"testing"

	"golang.org/x/net/http2/hpack"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

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

// countingListener counts what it accepts.
type countingListener struct {
	net.Listener
	n atomic.Int64
}

func (l *countingListener) Accept() (net.Conn, error) {
	conn, err := l.Listener.Accept()
	if err == nil {
		l.n.Add(1)
	}
	return conn, err
}

// TestManyDeniedConnections: many connections of clients that are not allowed cost little, and none
// of those clients can tell: it connects once, and again only for a call that it makes long
// afterwards.
func TestManyDeniedConnections(t *testing.T) {
	const n = 100
	ca := proxytest.NewAuthority(t, "ca")
	cert, key, _ := ca.Issue("server", "server")
	bound, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	counting := &countingListener{Listener: bound}
	startProxy(t, proxytest.ServeStore(t), everything, func(c *Config) {
		c.Listeners[0].Sockets = []net.Listener{counting}
		c.Listeners[0].TLS = &listener.TLS{CertFile: cert, KeyFile: key, ClientCAFile: ca.File}
		c.Listeners[0].AllowedClients = []string{"friend"}
	})
	conns := make([]*grpc.ClientConn, n)
	call := func(i int) {
		t.Helper()
		if _, err := proxytest.Get(t, conns[i]); status.Code(err) != codes.PermissionDenied {
			t.Fatalf("client %d: %v", i, err)
		}
	}
	for i := range conns {
		conns[i] = ca.Client(t, bound.Addr().String(), "other")
		call(i)
	}
	for i, conn := range conns {
		if state := conn.GetState(); state != connectivity.Ready {
			t.Errorf("client %d is %v", i, state) // and may connect again
		}
	}
	for i := n - 1; i >= n-20; i-- { // they are served
		call(i)
	}
	if got := counting.n.Load(); got != n {
		t.Errorf("%d clients have connected %d times", n, got)
	}
	for i := range conns { // most are not
		call(i)
	}
	if got := counting.n.Load(); got <= n || got > 2*n {
		t.Errorf("%d clients have connected %d times for two calls each", n, got)
	}
}
