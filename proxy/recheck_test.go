package proxy

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"io"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/prometheus/client_golang/prometheus"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/tlsfiles"
)

// rechecked is a proxy whose clients have certificates.
type rechecked struct {
	*running
	t       *testing.T
	ca, new *proxytest.Authority
	cas     string // the file of CAs
	crl     string
	figures *prometheus.Registry
}

func newRechecked(t *testing.T) *rechecked {
	t.Helper()
	r := &rechecked{t: t, ca: proxytest.NewAuthority(t, "ca"), new: proxytest.NewAuthority(t, "new"), figures: prometheus.NewRegistry()}
	cert, key, _ := r.ca.Issue("server", "server")
	r.cas, r.crl = filepath.Join(r.ca.Dir, "cas.pem"), filepath.Join(r.ca.Dir, "crl.pem")
	r.trust(r.ca)
	r.ca.Revoke(r.crl)
	r.running = startProxy(t, proxytest.ServeFake(t, steadyEtcd()), []etcdapi.Rule{{Prefix: "k", Sealer: proxytest.Reverser{}}}, func(c *Config) {
		c.Listeners[0].TLS = &listener.TLS{CertFile: cert, KeyFile: key, ClientCAFile: r.cas, ClientCRLFile: r.crl}
		c.Listeners[0].AllowedClients = []string{"stays", "goes"}
		c.Listeners[0].CiphertextClients = []string{"backup"}
		c.Registerer = r.figures
	})
	return r
}

// steadyEtcd gives each watch one event and keeps it, as etcd does.
func steadyEtcd() *proxytest.FakeEtcd {
	etcd := proxytest.EchoEtcd()
	etcd.WatchFn = func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
		if _, err := s.Recv(); err != nil {
			return err
		}
		if err := s.Send(&pb.WatchResponse{Events: []*mvccpb.Event{{Kv: &mvccpb.KeyValue{Key: []byte("k"), Value: proxytest.Sealed("k", "v")}}}}); err != nil {
			return err
		}
		<-s.Context().Done()
		return s.Context().Err()
	}
	return etcd
}

// trust writes the file of CAs.
func (r *rechecked) trust(cas ...*proxytest.Authority) {
	var all []byte
	for _, ca := range cas {
		all = append(all, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Cert.Raw})...)
	}
	proxytest.Replace(r.t, r.cas, all)
}

// keepOpen has a client keep something open of each kind, and returns how each of them ends.
func (r *rechecked) keepOpen(cert, key string) map[string]<-chan error {
	t := r.t
	t.Helper()
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	target := r.Addrs()[0].String()
	cfg := &tls.Config{RootCAs: x509.NewCertPool(), Certificates: []tls.Certificate{pair}}
	cfg.RootCAs.AddCert(r.ca.Cert)
	open := make(map[string]<-chan error)
	keep := func(name string, next func() error) {
		if err := next(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		ended := make(chan error, 1)
		open[name] = ended
		go func() { ended <- next() }()
	}
	stream, err := pb.NewWatchClient(proxytest.Dial(t, target, grpc.WithTransportCredentials(credentials.NewTLS(cfg.Clone())))).Watch(proxytest.TestContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(proxytest.CreateWatch("k", "")); err != nil {
		t.Fatal(err)
	}
	keep("a watch", func() error { _, err := stream.Recv(); return err })
	for name, protocol := range map[string]string{"a watch over JSON": tlsfiles.ProtocolHTTP1, "a watch over JSON and HTTP/2": tlsfiles.ProtocolHTTP2} {
		transport := &http.Transport{TLSClientConfig: cfg.Clone(), Protocols: new(http.Protocols)}
		transport.Protocols.SetHTTP1(protocol == tlsfiles.ProtocolHTTP1)
		transport.Protocols.SetHTTP2(protocol == tlsfiles.ProtocolHTTP2)
		t.Cleanup(transport.CloseIdleConnections)
		answer, err := (&http.Client{Transport: transport, Timeout: proxytest.Patience}).Post("https://"+target+"/v3/watch", "application/json", strings.NewReader(watchK))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { answer.Body.Close() })
		lines := bufio.NewReader(answer.Body)
		keep(name, func() error { _, err := lines.ReadString('\n'); return err })
	}
	dialer := websocket.Dialer{TLSClientConfig: cfg.Clone()}
	socket, _, err := dialer.Dial("wss://"+target+"/v3/watch", nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { socket.Close() })
	tell(t, socket, watchK)
	keep("a websocket", func() error { _, _, err := socket.ReadMessage(); return err })
	silent, err := tls.Dial("tcp", target, cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { silent.Close() })
	if _, err := io.WriteString(silent, "GET /"); err != nil {
		t.Fatal(err)
	}
	begun := false
	keep("half a request", func() error {
		if !begun {
			begun = true
			return nil
		}
		_, err := silent.Read(make([]byte, 1))
		return err
	})
	return open
}

// TestConnectionsAreRechecked: whatever would keep a client out, or have it treated in another way,
// ends its connections; others stay.
func TestConnectionsAreRechecked(t *testing.T) {
	for name, try := range map[string]struct {
		client  string
		valid   time.Duration
		renewed bool // the certificate is of the CA that is there to stay
		change  func(r *rechecked, leaf *x509.Certificate)
		reason  string // as the metric has it
		because string
		after   codes.Code // of its next call
	}{
		"revoked": {client: "goes", change: func(r *rechecked, leaf *x509.Certificate) { r.ca.Revoke(r.crl, leaf) }, reason: "certificate", because: "revoked", after: codes.Unavailable},
		"its CA is removed": {client: "goes", change: func(r *rechecked, _ *x509.Certificate) {
			r.new.Revoke(r.crl)
			r.trust(r.new)
		}, reason: "certificate", because: "unknown authority", after: codes.Unavailable},
		"expired":              {client: "goes", valid: 3 * time.Second, change: func(*rechecked, *x509.Certificate) {}, reason: "certificate", because: "expired", after: codes.Unavailable},
		"not allowed any more": {client: "goes", change: setClients([]string{"stays"}, nil), reason: "lists", because: "allowedClients", after: codes.PermissionDenied},
		"given ciphertext":     {client: "goes", change: setClients([]string{"stays", "goes"}, []string{"goes"}), reason: "lists", because: "ciphertextClients", after: codes.OK},
		"given plaintext":      {client: "backup", change: setClients(nil, nil), reason: "lists", because: "ciphertextClients", after: codes.OK},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			r := newRechecked(t)
			valid := try.valid
			if valid == 0 {
				valid = time.Hour
			}
			other := r.ca
			if name == "its CA is removed" {
				r.trust(r.ca, r.new)
				other = r.new
			}
			cert, key, _ := other.Issue("stays", "stays")
			stays := r.keepOpen(cert, key)
			cert, key, leaf := r.ca.IssueFor(valid, try.client, try.client)
			goes := r.keepOpen(cert, key)
			proxytest.Eventually(t, "all connections are there", func() bool {
				return series(t, r.figures, "etcd_kms_proxy_connections")[0].GetGauge().GetValue() == float64(len(stays)+len(goes))
			})
			try.change(r, leaf)
			for what, ended := range goes {
				if err := proxytest.Wait(t, ended, what+" ends"); err == nil {
					t.Errorf("%s goes on", what)
				} else if name == "expired" && time.Now().Before(leaf.NotAfter) {
					t.Errorf("%s ended before the certificate: %v", what, err)
				}
			}
			for what, ended := range stays {
				select {
				case err := <-ended:
					t.Errorf("%s of another client ended: %v", what, err)
				default:
				}
			}
			proxytest.Eventually(t, "the log says so", func() bool {
				logs := r.logs.String()
				return strings.Contains(logs, try.because) && strings.Contains(logs, "connections ended")
			})
			for _, m := range series(t, r.figures, "etcd_kms_proxy_ended_connections_total") {
				n := m.GetCounter().GetValue()
				for _, l := range m.GetLabel() {
					if l.GetName() == "reason" && l.GetValue() == try.reason && n != float64(len(goes)) {
						t.Errorf("%v connections are counted, want %d", n, len(goes))
					}
				}
			}
			pair, err := tls.LoadX509KeyPair(cert, key)
			if err != nil {
				t.Fatal(err)
			}
			cfg := &tls.Config{RootCAs: x509.NewCertPool(), Certificates: []tls.Certificate{pair}}
			cfg.RootCAs.AddCert(r.ca.Cert)
			if _, err := proxytest.Get(t, proxytest.Dial(t, r.Addrs()[0].String(), grpc.WithTransportCredentials(credentials.NewTLS(cfg)))); status.Code(err) != try.after {
				t.Errorf("its next call: %v", err)
			}
		})
	}
}

func setClients(allowed, ciphertext []string) func(*rechecked, *x509.Certificate) {
	return func(r *rechecked, _ *x509.Certificate) {
		if err := r.SetClients(0, allowed, ciphertext); err != nil {
			r.t.Error(err)
		}
	}
}

// TestUnrelatedChanges: changes that concern nobody end nothing.
func TestUnrelatedChanges(t *testing.T) {
	r := newRechecked(t)
	cert, key, _ := r.ca.Issue("stays", "stays")
	open := r.keepOpen(cert, key)
	_, _, another := r.ca.Issue("another", "another")
	for _, change := range []func(){
		func() { r.ca.Revoke(r.crl, another) },
		func() { r.trust(r.ca, r.new) },
		func() { r.ca.Issue("server", "server") }, // renewed
		func() { setClients([]string{"stays", "comes"}, []string{"backup"})(r, nil) },
		func() { setClients(nil, nil)(r, nil) }, // any certificate
	} {
		change()
		// which has connections checked
		setClients([]string{"stays", "goes"}, []string{"backup"})(r, nil)
	}
	if err := r.SetRules([]etcdapi.Rule{{Prefix: "k", Sealer: proxytest.Reverser{}}, {Prefix: "l", Sealer: proxytest.Reverser{}}}); err != nil {
		t.Fatal(err)
	}
	setClients([]string{"stays"}, nil)(r, nil)
	for what, ended := range open {
		select {
		case err := <-ended:
			t.Errorf("%s ended: %v", what, err)
		default:
		}
	}
	if err := r.SetClients(0, []string{"stays"}, nil); err != nil {
		t.Fatal(err)
	}
	plain := startProxy(t, proxytest.ServeFake(t, proxytest.EchoEtcd()), nil, nil)
	if err := plain.SetClients(0, []string{"stays"}, nil); err == nil {
		t.Error("a list without certificates")
	}
	if err := plain.SetClients(0, nil, nil); err != nil {
		t.Error(err)
	}
}
