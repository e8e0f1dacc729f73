package proxy

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

// TestSilentClient: a client that says nothing, or half a word, holds nobody up, the end of the
// proxy least of all.
func TestSilentClient(t *testing.T) {
	p := startProxy(t, proxytest.ServeFake(t, proxytest.EchoEtcd()), nil, nil)
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
	if _, err := proxytest.Get(t, p.dial(t)); err != nil {
		t.Errorf("beside silent clients: %v", err)
	}
	begun := time.Now()
	if err := p.stop(); err != nil || time.Since(begun) > DefaultDrainTimeout+proxytest.Patience/2 {
		t.Errorf("the end: %v after %v", err, time.Since(begun))
	}
}

// TestGatewayTLS: over TLS, who speaks HTTP and who speaks gRPC meet on one port, and a denied
// client is one for both.
func TestGatewayTLS(t *testing.T) {
	etcd := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprintf(w, "etcd's own %s", r.URL) }))
	defer etcd.Close()
	ca := proxytest.NewAuthority(t, "ca")
	cert, key, _ := ca.Issue("server", "server")
	clientCAs := ca.Dir + "/clients.pem"
	proxytest.WritePEM(t, clientCAs, "CERTIFICATE", ca.Cert.Raw)
	p := startProxy(t, strings.TrimPrefix(etcd.URL, "http://"), nil, func(c *Config) {
		c.Listeners[0].TLS = &listener.TLS{CertFile: cert, KeyFile: key, ClientCAFile: clientCAs}
		c.Listeners[0].AllowedClients = []string{"friend"}
	})
	roots := x509.NewCertPool()
	roots.AddCert(ca.Cert)
	for name, status := range map[string]int{"friend": http.StatusOK, "stranger": http.StatusForbidden} {
		c, k, _ := ca.Issue(name, name)
		pair, err := tls.LoadX509KeyPair(c, k)
		if err != nil {
			t.Fatal(err)
		}
		transport := &http.Transport{ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}, InsecureSkipVerify: true}}
		client := &http.Client{Transport: transport, Timeout: proxytest.Patience}
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

// TestEtcdOverHTTP: what etcd says over HTTP is passed on from the first endpoint that answers,
// over unix sockets and TLS too, and nothing else of it.
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
	local := &http.Server{Handler: handler, ReadHeaderTimeout: proxytest.Patience}
	go func() { _ = local.Serve(l) }()
	defer local.Close()
	caFile := t.TempDir() + "/ca.pem"
	proxytest.WritePEM(t, caFile, "CERTIFICATE", secure.Certificate().Raw)
	for name, u := range map[string]upstream.Config{
		"the second endpoint": {Endpoints: []string{"http://127.0.0.1:1", clear.URL}},
		"a unix socket":       {Endpoints: []string{"unix://" + socket}},
		"TLS":                 {Endpoints: []string{secure.URL}, TLS: &upstream.TLS{CAFile: caFile}},
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
	if answer.StatusCode != http.StatusBadGateway || !bytes.HasPrefix(body, []byte(rpc.TextPrefix)) {
		t.Errorf("without etcd: %d %q", answer.StatusCode, body)
	}
}
