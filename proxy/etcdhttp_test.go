package proxy

import (
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// TestHTTPEndpoints: where etcd serves HTTP elsewhere than gRPC, it is asked there, by a listener
// for one member only that member's; and where nobody has said so, the response says what to do.
func TestHTTPEndpoints(t *testing.T) {
	own := func(name string) http.Handler {
		return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, name) })
	}
	one, two := httptest.NewServer(own("one")), httptest.NewUnstartedServer(own("two"))
	defer one.Close()
	two.Config.ErrorLog = log.New(io.Discard, "", 0)
	two.StartTLS()
	defer two.Close()
	caFile := t.TempDir() + "/ca.pem"
	proxytest.WritePEM(t, caFile, "CERTIFICATE", two.Certificate().Raw)
	a, b := "http://"+proxytest.ServeFake(t, proxytest.EchoEtcd()), "http://"+proxytest.ServeFake(t, proxytest.EchoEtcd())
	for _, try := range []struct {
		name string
		cfg  upstream.Config
		pin  string
		want string
		code int
	}{
		{"both", upstream.Config{Endpoints: []string{a, b}, HTTPEndpoints: []string{one.URL, two.URL}}, "", "one", 200},
		{"the first is down", upstream.Config{Endpoints: []string{a, b}, HTTPEndpoints: []string{"http://127.0.0.1:1", two.URL}, TLS: &upstream.TLS{CAFile: caFile}}, "", "two", 200},
		{"TLS of another CA", upstream.Config{Endpoints: []string{b}, HTTPEndpoints: []string{two.URL}}, "", "etcd is unreachable", 502},
		{"one member", upstream.Config{Endpoints: []string{a, b}, HTTPEndpoints: []string{one.URL, two.URL}, TLS: &upstream.TLS{CAFile: caFile}}, b, "two", 200},
		{"not said", upstream.Config{Endpoints: []string{a}}, "", "write these URLs to etcd.httpEndpoints", 502},
		{"said wrongly", upstream.Config{Endpoints: []string{a}, HTTPEndpoints: []string{a}}, "", "does not answer HTTP/1.1 at etcd.httpEndpoints", 502},
		{"down", upstream.Config{Endpoints: []string{a}, HTTPEndpoints: []string{"http://127.0.0.1:1"}}, "", "etcd is unreachable", 502},
	} {
		p := startProxy(t, "", nil, func(c *Config) {
			c.Upstream = try.cfg
			c.Listeners[0].Endpoint = try.pin
		})
		for range 2 {
			if code, body, _ := send(t, "tcp", p.Addrs()[0].String(), "GET", "/health", "", nil); code != try.code || !strings.Contains(body, try.want) {
				t.Errorf("%s: %d %q", try.name, code, body)
			}
		}
		if n := strings.Count(p.logs.String(), "does not answer HTTP/1.1"); (n == 1) != strings.Contains(try.want, "httpEndpoints") {
			t.Errorf("%s: it is logged %d times", try.name, n)
		}
	}
	_, err := New(Config{Listeners: []listener.Config{{Address: "127.0.0.1:0"}}, Upstream: upstream.Config{Endpoints: []string{a, b}, HTTPEndpoints: []string{one.URL}}})
	if err == nil || !strings.Contains(err.Error(), "1 for 2") {
		t.Errorf("one URL for two endpoints: %v", err)
	}
}
