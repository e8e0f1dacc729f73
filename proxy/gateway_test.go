package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"
)

// scripted is a connection that reads what it is given.
type scripted struct {
	net.Conn
	r io.Reader
}

func (c scripted) Read(b []byte) (int, error) { return c.r.Read(b) }

func (scripted) SetReadDeadline(time.Time) error { return nil }

func sniffString(t testing.TB, said string, oneByOne bool) (http1 bool, all string, err error) {
	t.Helper()
	var r io.Reader = strings.NewReader(said)
	if oneByOne {
		r = iotest.OneByteReader(r)
	}
	conn, http1, err := sniff(context.Background(), scripted{r: r})
	if err != nil {
		return false, "", err
	}
	rest, err := io.ReadAll(conn)
	if err != nil {
		t.Fatal(err)
	}
	return http1, string(rest), nil
}

func TestSniff(t *testing.T) {
	for said, want := range map[string]bool{
		"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00": false, "PRI": false, "GET / HTTP/1.1\r\n": true, "POST /v3/kv/put HTTP/1.1": true, "PROPFIND / HTTP/1.1": true, "P": true, "PRX": true, "\x16\x03\x01": true, "\x00": true,
	} {
		for _, oneByOne := range []bool{false, true} {
			http1, all, err := sniffString(t, said, oneByOne)
			switch {
			case said == "P":
				if !errors.Is(err, io.EOF) {
					t.Errorf("%q: %v", said, err)
				}
			case err != nil || http1 != want || all != said:
				t.Errorf("%q: HTTP/1 %t, %q, %v", said, http1, all, err)
			}
		}
	}
}

// TestSilentClient: a client that says nothing, or half a word, holds nobody up, the end of the proxy least of all.
func TestSilentClient(t *testing.T) {
	p := startProxy(t, serveFake(t, echoEtcd()), nil, nil)
	for _, said := range []string{"", "P", "GET /health", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff garbage"} {
		conn, err := net.Dial("tcp", p.Addrs()[0].String())
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := io.WriteString(conn, said); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := get(t, p.dial(t)); err != nil {
		t.Errorf("beside silent clients: %v", err)
	}
	begun := time.Now()
	if err := p.stop(); err != nil || time.Since(begun) > DefaultDrainTimeout+patience/2 {
		t.Errorf("the end: %v after %v", err, time.Since(begun))
	}
}

// TestGatewayOfBeta: etcd's older name of /v3/ is one here, and hides nothing from what looks at the path.
func TestGatewayOfBeta(t *testing.T) {
	var seen []string
	h := ofBeta(http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) { seen = append(seen, r.URL.RequestURI()) }))
	for _, path := range []string{"/v3beta/kv/range?a=b", "/v3/kv/range", "/v3beta", "/v3beta/", "/v3alpha/kv/range", "/x/v3beta/"} {
		r := httptest.NewRequest(http.MethodPost, path, nil)
		if h.ServeHTTP(httptest.NewRecorder(), r); r.URL.RequestURI() != path {
			t.Errorf("%s: the request itself was changed", path)
		}
	}
	if want := []string{"/v3/kv/range?a=b", "/v3/kv/range", "/v3beta", "/v3/", "/v3alpha/kv/range", "/x/v3beta/"}; !slices.Equal(seen, want) {
		t.Errorf("%q", seen)
	}
}

// TestGatewayTLS: over TLS, who speaks HTTP and who speaks gRPC meet on one port, and a denied client is one for both.
func TestGatewayTLS(t *testing.T) {
	etcd := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "etcd's own %s", r.URL) }))
	defer etcd.Close()
	ca := newAuthority(t, "ca")
	cert, key, _ := ca.issue("server", "server")
	clientCAs := ca.dir + "/clients.pem"
	writePEM(t, clientCAs, "CERTIFICATE", ca.cert.Raw)
	p := startProxy(t, strings.TrimPrefix(etcd.URL, "http://"), nil, func(c *Config) {
		c.Listeners[0].TLS = &ListenerTLS{CertFile: cert, KeyFile: key, ClientCAFile: clientCAs}
		c.Listeners[0].AllowedClients = []string{"friend"}
	})
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)
	for name, status := range map[string]int{"friend": http.StatusOK, "stranger": http.StatusForbidden} {
		c, k, _ := ca.issue(name, name)
		pair, err := tls.LoadX509KeyPair(c, k)
		if err != nil {
			t.Fatal(err)
		}
		transport := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, InsecureSkipVerify: true}}
		client := &http.Client{Transport: transport, Timeout: patience}
		answer, err := client.Get("https://" + p.Addrs()[0].String() + "/health?serializable=true")
		if err != nil {
			t.Fatal(err)
		}
		body, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		transport.CloseIdleConnections()
		if err != nil || answer.StatusCode != status || (status == http.StatusOK) != (string(body) == "etcd's own /health?serializable=true") {
			t.Errorf("%s: %d %q, %v", name, answer.StatusCode, body, err)
		}
	}
}

// TestEtcdOverHTTP: what etcd says over HTTP is passed on from the first endpoint that answers, over unix sockets and TLS too, and nothing else of it.
func TestEtcdOverHTTP(t *testing.T) {
	handler := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, r.URL.Path) })
	clear, secure := httptest.NewServer(handler), httptest.NewUnstartedServer(handler)
	secure.Config.ErrorLog = log.New(io.Discard, "", 0) // the engine's own connection wants HTTP/2
	secure.StartTLS()
	defer clear.Close()
	defer secure.Close()
	socket := t.TempDir() + "/etcd.sock"
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	local := &http.Server{Handler: handler, ReadHeaderTimeout: patience}
	go func() { _ = local.Serve(l) }()
	defer local.Close()
	caFile := t.TempDir() + "/ca.pem"
	writePEM(t, caFile, "CERTIFICATE", secure.Certificate().Raw)
	for name, u := range map[string]UpstreamConfig{
		"the second endpoint": {Endpoints: []string{"http://127.0.0.1:1", clear.URL}},
		"a unix socket":       {Endpoints: []string{"unix://" + socket}},
		"TLS":                 {Endpoints: []string{secure.URL}, TLS: &UpstreamTLS{CAFile: caFile}},
	} {
		p := startProxy(t, "", nil, func(c *Config) { c.Upstream = u })
		base := "http://" + p.Addrs()[0].String()
		for path, status := range map[string]int{"/health": 200, "/readyz/ping": 200, "/version": 200, "/debug/pprof/": 404, "/config": 404, "/": 404} {
			answer, err := http.Get(base + path)
			if err != nil {
				t.Fatal(err)
			}
			body, _ := io.ReadAll(answer.Body)
			answer.Body.Close()
			if answer.StatusCode != status || status == 200 && string(body) != path {
				t.Errorf("%s, %s: %d %q", name, path, answer.StatusCode, body)
			}
		}
		http.DefaultClient.CloseIdleConnections()
	}
	p := startProxy(t, "127.0.0.1:1", nil, nil)
	answer, err := http.Get("http://" + p.Addrs()[0].String() + "/health")
	if err != nil {
		t.Fatal(err)
	}
	body, _ := io.ReadAll(answer.Body)
	answer.Body.Close()
	http.DefaultClient.CloseIdleConnections()
	if answer.StatusCode != http.StatusBadGateway || !bytes.HasPrefix(body, []byte(ownPrefix)) {
		t.Errorf("without etcd: %d %q", answer.StatusCode, body)
	}
}
