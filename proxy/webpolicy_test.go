package proxy

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/gorilla/websocket"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// webBase runs a proxy before an etcd that answers gRPC and HTTP, and returns the address that it
// listens on.
func webBase(t *testing.T, edit func(*Config)) string {
	t.Helper()
	own := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Access-Control-Allow-Origin", "*")
		w.Header().Set("Access-Control-Allow-Methods", "GET")
		fmt.Fprintf(w, "%s %s", r.Method, r.URL.Path)
	}))
	t.Cleanup(own.Close)
	p := startProxy(t, proxytest.ServeFake(t, proxytest.EchoEtcd()), []etcdapi.Rule{{Prefix: "k", Sealer: proxytest.Reverser{}}}, func(c *Config) {
		c.Upstream.HTTPEndpoints = []string{own.URL}
		if edit != nil {
			edit(c)
		}
	})
	return p.Addrs()[0].String()
}

// header fields of a request, by name.
type fields map[string]string

// send makes a request over a connection to address.
func send(t *testing.T, network, address, method, path, body string, header fields) (int, string, http.Header) {
	t.Helper()
	r, err := http.NewRequestWithContext(proxytest.TestContext(t), method, "http://127.0.0.1"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	for name, v := range header {
		if r.Header.Set(name, v); name == "Host" {
			r.Host = v
		}
	}
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return new(net.Dialer).DialContext(ctx, network, address)
	}}
	defer transport.CloseIdleConnections()
	answer, err := transport.RoundTrip(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	data, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, string(data), answer.Header
}

const rangeOfK = `{"key":"aw=="}` // the key k

// TestWebPages: what web pages can have a browser send reaches neither the gateway nor what etcd
// says of itself, and what other clients send does.
func TestWebPages(t *testing.T) {
	address := webBase(t, func(c *Config) {
		c.Listeners[0].AdvertiseClientURLs = []string{"http://etcd.example:2379"}
	})
	const firefox = "Mozilla/5.0 (X11; Linux x86_64; rv:60.0) Gecko/20100101 Firefox/60.0"
	for name, try := range map[string]struct {
		header fields
		want   int
	}{
		"curl":                            {fields{"Content-Type": "application/x-www-form-urlencoded", "User-Agent": "curl/8.5.0"}, 200},
		"a library that says text/plain":  {fields{"Content-Type": "text/plain; charset=utf-8", "User-Agent": "node", "Sec-Fetch-Mode": "cors"}, 200},
		"no content type":                 {fields{"User-Agent": "python-requests/2"}, 200},
		"localhost":                       {fields{"Host": "localhost:2379"}, 200},
		"below localhost":                 {fields{"Host": "etcd.LOCALHOST."}, 200},
		"an address":                      {fields{"Host": "10.0.0.7:2379"}, 200},
		"an IPv6 address":                 {fields{"Host": "[2001:db8::1]:2379"}, 200},
		"an IPv6 address without a port":  {fields{"Host": "[::1]"}, 200},
		"an advertised name":              {fields{"Host": "ETCD.example:2379"}, 200},
		"an advertised name's other port": {fields{"Host": "etcd.example"}, 200},
		"another name":                    {fields{"Host": "rebound.example:2379"}, 421},
		"a name below an advertised one":  {fields{"Host": "x.etcd.example:2379"}, 421},
		"a name that ends like localhost": {fields{"Host": "notlocalhost:2379"}, 421},
		"a name that looks like an IP":    {fields{"Host": "127.0.0.1.example:2379"}, 421},
		"a page of its own":               {fields{"Host": "localhost:2379", "Origin": "http://localhost:2379"}, 200},
		"a foreign page":                  {fields{"Origin": "http://page.example"}, 403},
		"a foreign page's text":           {fields{"Origin": "http://page.example", "Content-Type": "text/plain"}, 403},
		"a page on another port":          {fields{"Host": "localhost:2379", "Origin": "http://localhost:8080"}, 403},
		"a page without an origin":        {fields{"Origin": "null"}, 403},
		"a page of a file":                {fields{"Origin": "file://"}, 403},
		"a foreign page by fetch":         {fields{"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403},
		"a page of a sister site":         {fields{"Sec-Fetch-Site": "same-site"}, 403},
		"a page of its own by fetch":      {fields{"Sec-Fetch-Site": "same-origin", "User-Agent": firefox, "Content-Type": "text/plain"}, 200},
		"a rebound page":                  {fields{"Host": "rebound.example:2379", "Origin": "http://rebound.example:2379", "Sec-Fetch-Site": "same-origin"}, 421},
		"an old browser's form":           {fields{"User-Agent": firefox, "Content-Type": "text/plain"}, 415},
		"an old browser's multipart form": {fields{"User-Agent": firefox, "Content-Type": "multipart/form-data; boundary=x"}, 415},
		"an old browser without a type":   {fields{"User-Agent": firefox}, 415},
		"an old browser's JSON":           {fields{"User-Agent": firefox, "Content-Type": "application/json; charset=utf-8"}, 200},
	} {
		for _, path := range []string{"/v3/kv/range", "/v3beta/kv/range"} {
			status, body, header := send(t, "tcp", address, "POST", path, rangeOfK, try.header)
			if status != try.want || (status == 200) != strings.Contains(body, `"value"`) {
				t.Errorf("%s, %s: %d %q", name, path, status, body)
			}
			if status != 200 && (!strings.HasPrefix(body, `{"code":`) || !strings.Contains(body, rpc.TextPrefix) || strings.Contains(body, "example")) {
				t.Errorf("%s, %s: %q", name, path, body)
			}
			for h := range header {
				if strings.HasPrefix(h, "Access-Control-") {
					t.Errorf("%s, %s: %s", name, path, h)
				}
			}
		}
		want := try.want
		// a page does not see the response to a GET without an origin
		if want == 415 || try.header["Origin"] == "" && want == 403 {
			want = 200
		}
		for _, path := range []string{"/health", "/livez", "/readyz", "/version", "/metrics"} {
			if status, body, _ := send(t, "tcp", address, "GET", path, "", try.header); status != want {
				t.Errorf("%s, %s: %d %q", name, path, status, body)
			}
		}
		dialer := websocket.Dialer{NetDialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return net.Dial("tcp", address) }}
		header := make(http.Header)
		for name, v := range try.header {
			header.Set(name, v)
		}
		conn, answer, err := dialer.DialContext(proxytest.TestContext(t), "ws://127.0.0.1/v3/watch", header)
		if want = try.want; want == 415 { // browsers say where a websocket comes from
			want = 200
		}
		if got := answer.StatusCode; (err == nil) != (want == 200) || err != nil && got != want {
			t.Errorf("%s, a websocket: %d, %v", name, got, err)
		}
		if err == nil {
			conn.Close()
		}
	}
}

// TestEtcdsOwnPaths: etcd responds to every method on its own paths, without its leave for scripts
// of other origins, and OPTIONS is nobody's.
func TestEtcdsOwnPaths(t *testing.T) {
	address := webBase(t, nil)
	for _, path := range []string{"/health", "/livez", "/livez/x", "/readyz", "/version", "/metrics"} {
		for _, method := range []string{"GET", "POST", "PUT", "DELETE", "PATCH"} {
			status, body, header := send(t, "tcp", address, method, path, "something", nil)
			if status != 200 || body != method+" "+path || len(header["Access-Control-Allow-Origin"])+len(header["Access-Control-Allow-Methods"]) > 0 {
				t.Errorf("%s %s: %d %q %v", method, path, status, body, header)
			}
		}
	}
	for _, path := range []string{"/health", "/metrics", "/v3/kv/range", "/nothing"} {
		if status, body, header := send(t, "tcp", address, "OPTIONS", path, "", nil); status != 200 || body != "" || len(header["Access-Control-Allow-Origin"]) > 0 {
			t.Errorf("OPTIONS %s: %d %q %v", path, status, body, header)
		}
	}
}

// TestHostOnSockets: on a unix socket, which no browser reaches, clients name any host.
func TestHostOnSockets(t *testing.T) {
	socket := t.TempDir() + "/etcd.sock"
	webBase(t, func(c *Config) { c.Listeners[0].Address = "unix://" + socket })
	for _, host := range []string{"etcd", "elsewhere.example:1", "localhost"} {
		if status, body, _ := send(t, "unix", socket, "POST", "/v3/kv/range", rangeOfK, fields{"Host": host}); status != 200 {
			t.Errorf("%s: %d %q", host, status, body)
		}
	}
	if status, _, _ := send(t, "unix", socket, "POST", "/v3/kv/range", rangeOfK, fields{"Origin": "http://page.example"}); status != 403 {
		t.Errorf("a foreign origin: %d", status)
	}
}

// TestNoGateway: without the gateway its paths are unknown, and the rest is there.
func TestNoGateway(t *testing.T) {
	address := webBase(t, func(c *Config) { c.Listeners[0].NoGateway = true })
	for path, want := range map[string]int{"/v3/kv/range": 404, "/v3beta/kv/range": 404, "/v3/watch": 404, "/health": 200, "/metrics": 200} {
		if status, body, _ := send(t, "tcp", address, "POST", path, rangeOfK, nil); status != want {
			t.Errorf("%s: %d %q", path, status, body)
		}
	}
	if _, answer, err := websocket.DefaultDialer.DialContext(proxytest.TestContext(t), "ws://"+address+"/v3/watch", nil); err == nil || answer.StatusCode != 404 {
		t.Errorf("a websocket: %v, %v", answer, err)
	}
}
