package proxy

import (
	"bufio"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/gorilla/websocket"
	"github.com/prometheus/client_golang/prometheus/testutil"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
)

// rechecked is a proxy whose clients have certificates.
type rechecked struct {
	*running
	t       *testing.T
	ca, new *authority
	cas     string // the file of CAs
	crl     string
}

func newRechecked(t *testing.T) *rechecked {
	t.Helper()
	r := &rechecked{t: t, ca: newAuthority(t, "ca"), new: newAuthority(t, "new")}
	cert, key, _ := r.ca.issue("server", "server")
	r.cas, r.crl = filepath.Join(r.ca.dir, "cas.pem"), filepath.Join(r.ca.dir, "crl.pem")
	r.trust(r.ca)
	r.ca.revoke(r.crl)
	r.running = startProxy(t, serveFake(t, steadyEtcd()), []Rule{{Prefix: "k", Sealer: reverser{}}}, func(c *Config) {
		c.Listeners[0].TLS = &ListenerTLS{CertFile: cert, KeyFile: key, ClientCAFile: r.cas, ClientCRLFile: r.crl}
		c.Listeners[0].AllowedClients = []string{"stays", "goes"}
		c.Listeners[0].CiphertextClients = []string{"backup"}
	})
	return r
}

// steadyEtcd gives each watch one event and keeps it, as etcd does.
func steadyEtcd() *fakeEtcd {
	etcd := echoEtcd()
	etcd.watchFn = func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
		if _, err := s.Recv(); err != nil {
			return err
		}
		if err := s.Send(&pb.WatchResponse{Events: []*mvccpb.Event{{Kv: &mvccpb.KeyValue{Key: []byte("k"), Value: sealed("k", "v")}}}}); err != nil {
			return err
		}
		<-s.Context().Done()
		return s.Context().Err()
	}
	return etcd
}

// trust writes the file of CAs.
func (r *rechecked) trust(cas ...*authority) {
	var all []byte
	for _, ca := range cas {
		all = append(all, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.cert.Raw})...)
	}
	replace(r.t, r.cas, all)
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
	cfg.RootCAs.AddCert(r.ca.cert)
	open := make(map[string]<-chan error)
	keep := func(name string, next func() error) {
		if err := next(); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		ended := make(chan error, 1)
		open[name] = ended
		go func() { ended <- next() }()
	}
	stream, err := pb.NewWatchClient(dial(t, target, grpc.WithTransportCredentials(credentials.NewTLS(cfg.Clone())))).Watch(testContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if err := stream.Send(createWatch("k", "")); err != nil {
		t.Fatal(err)
	}
	keep("a watch", func() error { _, err := stream.Recv(); return err })
	for name, protocol := range map[string]string{"a watch over JSON": protocolHTTP1, "a watch over JSON and HTTP/2": protocolHTTP2} {
		transport := &http.Transport{TLSClientConfig: cfg.Clone(), Protocols: new(http.Protocols)}
		transport.Protocols.SetHTTP1(protocol == protocolHTTP1)
		transport.Protocols.SetHTTP2(protocol == protocolHTTP2)
		t.Cleanup(transport.CloseIdleConnections)
		answer, err := (&http.Client{Transport: transport, Timeout: patience}).Post("https://"+target+"/v3/watch", "application/json", strings.NewReader(watchK))
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
		"revoked": {client: "goes", change: func(r *rechecked, leaf *x509.Certificate) { r.ca.revoke(r.crl, leaf) }, reason: "certificate", because: "revoked", after: codes.Unavailable},
		"its CA is removed": {client: "goes", change: func(r *rechecked, _ *x509.Certificate) {
			r.new.revoke(r.crl)
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
			cert, key, _ := other.issue("stays", "stays")
			stays := r.keepOpen(cert, key)
			cert, key, leaf := r.ca.issueFor(valid, try.client, try.client)
			goes := r.keepOpen(cert, key)
			eventually(t, "all connections are there", func() bool {
				l := r.listeners[0]
				l.open.mu.Lock()
				defer l.open.mu.Unlock()
				return len(l.open.conns) == len(stays)+len(goes)
			})
			try.change(r, leaf)
			for what, ended := range goes {
				if err := wait(t, ended, what+" ends"); err == nil {
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
			eventually(t, "the log says so", func() bool {
				logs := r.logs.String()
				return strings.Contains(logs, try.because) && strings.Contains(logs, "connections ended")
			})
			if n := testutil.ToFloat64(r.listeners[0].metrics.ended.WithLabelValues("127.0.0.1:0", try.reason)); n != float64(len(goes)) {
				t.Errorf("%v connections are counted, want %d", n, len(goes))
			}
			pair, err := tls.LoadX509KeyPair(cert, key)
			if err != nil {
				t.Fatal(err)
			}
			cfg := &tls.Config{RootCAs: x509.NewCertPool(), Certificates: []tls.Certificate{pair}}
			cfg.RootCAs.AddCert(r.ca.cert)
			if _, err := get(t, dial(t, r.Addrs()[0].String(), grpc.WithTransportCredentials(credentials.NewTLS(cfg)))); status.Code(err) != try.after {
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
	cert, key, _ := r.ca.issue("stays", "stays")
	open := r.keepOpen(cert, key)
	_, _, another := r.ca.issue("another", "another")
	for _, change := range []func(){
		func() { r.ca.revoke(r.crl, another) },
		func() { r.trust(r.ca, r.new) },
		func() { r.ca.issue("server", "server") }, // renewed
		func() { setClients([]string{"stays", "comes"}, []string{"backup"})(r, nil) },
		func() { setClients(nil, nil)(r, nil) }, // any certificate
	} {
		change()
		r.listeners[0].recheck(time.Now())
	}
	if err := r.SetRules([]Rule{{Prefix: "k", Sealer: reverser{}}, {Prefix: "l", Sealer: reverser{}}}); err != nil {
		t.Fatal(err)
	}
	r.listeners[0].recheck(time.Now())
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
	plain := startProxy(t, serveFake(t, echoEtcd()), nil, nil)
	if err := plain.SetClients(0, []string{"stays"}, nil); err == nil {
		t.Error("a list without certificates")
	}
	if err := plain.SetClients(0, nil, nil); err != nil {
		t.Error(err)
	}
}

// TestAdmitLate: a connection that was identified by files of before is checked by those of now,
// before it is served.
func TestAdmitLate(t *testing.T) {
	r := newRechecked(t)
	_, _, leaf := r.ca.issue("goes", "goes")
	near, far := net.Pipe()
	defer near.Close()
	defer far.Close()
	l := r.listeners[0]
	c := &clientConn{Conn: far, id: &Identity{CommonName: "goes"}, certs: []*x509.Certificate{leaf}, expires: leaf.NotAfter}
	by := l.terms()
	if err := l.admit(c, by); err != nil {
		t.Fatal(err)
	}
	l.forget(c)
	setClients([]string{"stays"}, nil)(r, nil)
	if err := l.admit(c, by); !errors.Is(err, errOtherLists) {
		t.Errorf("after its name has left the list: %v", err)
	}
	by = l.terms()
	r.ca.revoke(r.crl, leaf)
	if err := l.admit(c, by); err == nil || !strings.Contains(err.Error(), "revoked") {
		t.Errorf("after it was revoked: %v", err)
	}
	if len(l.open.conns) != 0 {
		t.Error("it is kept")
	}
}
