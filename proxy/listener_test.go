package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/prometheus/client_golang/prometheus/testutil"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/metrics"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

func TestClientLists(t *testing.T) {
	told := make(chan []string, 10)
	ca := proxytest.NewAuthority(t, "ca")
	cert, key, _ := ca.Issue("server", "server")
	p := startProxy(t, proxytest.ServeFake(t, proxytest.EchoEtcd()), []etcdapi.Rule{{Prefix: "k", Sealer: proxytest.Reverser{}}}, func(c *Config) {
		c.Listeners[0].TLS = &listener.TLS{CertFile: cert, KeyFile: key, ClientCAFile: ca.File}
		c.Listeners[0].AllowedClients = []string{"api", "api.example"}
		c.Listeners[0].CiphertextClients = []string{"backup"}
		c.OnDenied = func(listener, client, remote string) { told <- []string{listener, client, remote} }
	})
	target := p.Addrs()[0].String()
	for _, tt := range []struct {
		cn    string
		names []string
		want  string
		code  codes.Code
	}{
		{"api", nil, "v", codes.OK},
		{"", []string{"api.example"}, "v", codes.OK},
		{"backup", nil, string(proxytest.Sealed("k", "v")), codes.OK},
		{"api", []string{"backup"}, string(proxytest.Sealed("k", "v")), codes.OK},
		{"stranger", []string{"a.example", "b.example"}, "", codes.PermissionDenied},
	} {
		conn := ca.Client(t, target, tt.cn, tt.names...)
		got, err := proxytest.Get(t, conn)
		if status.Code(err) != tt.code || got != tt.want {
			t.Errorf("%s %v: %q, %v", tt.cn, tt.names, got, err)
		}
		if tt.code == codes.PermissionDenied {
			_, err = proxytest.Get(t, conn)
			if !strings.HasPrefix(status.Convert(err).Message(), rpc.TextPrefix) {
				t.Errorf("got %v", err)
			}
			s, err := pb.NewWatchClient(conn).Watch(proxytest.TestContext(t))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.Recv(); status.Code(err) != codes.PermissionDenied {
				t.Errorf("watch: %v", err)
			}
		}
	}
	if n := strings.Count(p.logs.String(), "client denied"); n != 1 {
		t.Errorf("the stranger is logged %d times", n)
	}
	if len(told) != 1 {
		t.Fatalf("%d denials are told", len(told))
	}
	if got := <-told; got[1] != "stranger" || got[0] == "" || !strings.HasPrefix(got[2], "127.0.0.1:") {
		t.Errorf("told of %q", got)
	}
	if _, err := proxytest.Get(t, ca.Client(t, target, "")); status.Code(err) != codes.Unavailable {
		t.Errorf("without a certificate: %v", err)
	}
	proxytest.Eventually(t, "the refused handshake is logged", func() bool { return strings.Contains(p.logs.String(), "connection rejected") })
}

func TestCiphertextClientsDoNotWrite(t *testing.T) {
	ca := proxytest.NewAuthority(t, "ca")
	cert, key, _ := ca.Issue("server", "server")
	p := startProxy(t, proxytest.ServeFake(t, proxytest.EchoEtcd()), []etcdapi.Rule{{Prefix: "k", Sealer: proxytest.Reverser{}}}, func(c *Config) {
		c.Listeners[0].TLS = &listener.TLS{CertFile: cert, KeyFile: key, ClientCAFile: ca.File}
		c.Listeners[0].CiphertextClients = []string{"backup"}
	})
	conn := ca.Client(t, p.Addrs()[0].String(), "backup")
	kv, ctx := pb.NewKVClient(conn), proxytest.TestContext(t)
	put := func(k string) *pb.PutRequest { return &pb.PutRequest{Key: []byte(k), Value: []byte("v")} }
	putOp := func(k string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put(k)}}
	}
	delOp := func(k, end string) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: []byte(k), RangeEnd: []byte(end)}}}
	}
	txn := func(op *pb.RequestOp) error {
		nested := &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Failure: []*pb.RequestOp{op}}}}
		_, err := kv.Txn(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{nested}})
		return err
	}
	del := func(k, end string) error {
		_, err := kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte(k), RangeEnd: []byte(end)})
		return err
	}
	_, covered := kv.Put(ctx, put("key"))
	keep := put("key")
	keep.Value, keep.IgnoreValue = nil, true
	_, ignore := kv.Put(ctx, keep)
	_, plain := kv.Put(ctx, put("other"))
	// its keys are not named
	_, revoke := pb.NewLeaseClient(conn).LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: 1})
	for what, tt := range map[string]struct {
		err    error
		denied bool
	}{
		"put": {covered, true}, "put that keeps the value": {ignore, true}, "put elsewhere": {plain, true}, "revoke": {revoke, true},
		"delete": {del("a", "z"), true}, "delete elsewhere": {del("a", "k"), true},
		"txn put": {txn(putOp("key")), true}, "txn put elsewhere": {txn(putOp("other")), true},
		"txn delete": {txn(delOp("a", "\x00")), true}, "txn delete elsewhere": {txn(delOp("l", "\x00")), true},
	} {
		if denied := status.Code(tt.err) == codes.PermissionDenied; denied != tt.denied || (!denied && tt.err != nil) {
			t.Errorf("%s: %v", what, tt.err)
		}
	}
	s, err := pb.NewWatchClient(conn).Watch(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Send(proxytest.CreateWatch("k", "")); err != nil {
		t.Fatal(err)
	}
	if r, err := s.Recv(); err != nil || string(r.Events[0].Kv.Value) != string(proxytest.Sealed("k", "v")) {
		t.Errorf("watch: %v, %v", r, err)
	}
}

func TestListenerTLSReload(t *testing.T) {
	ca, other := proxytest.NewAuthority(t, "ca"), proxytest.NewAuthority(t, "other")
	cert, key, _ := ca.Issue("server", "server")
	crl := filepath.Join(ca.Dir, "crl.pem")
	ca.Revoke(crl)
	clientCAs := filepath.Join(ca.Dir, "clients.pem")
	proxytest.WritePEM(t, clientCAs, "CERTIFICATE", ca.Cert.Raw)
	p := startProxy(t, proxytest.ServeFake(t, proxytest.EchoEtcd()), nil, func(c *Config) {
		c.Listeners[0].TLS = &listener.TLS{CertFile: cert, KeyFile: key, ClientCAFile: clientCAs, ClientCRLFile: crl, MinVersion: "1.2",
			CipherSuites: []string{"TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256"}}
	})
	target := p.Addrs()[0].String()
	served := func() string {
		cfg := &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12, NextProtos: []string{"h2"}}
		c, k, _ := ca.Issue("probe", "probe")
		pair, err := tls.LoadX509KeyPair(c, k)
		if err != nil {
			t.Fatal(err)
		}
		cfg.Certificates = []tls.Certificate{pair}
		conn, err := tls.Dial("tcp", target, cfg)
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if s := conn.ConnectionState(); s.CipherSuite != tls.TLS_ECDHE_ECDSA_WITH_AES_128_GCM_SHA256 || s.NegotiatedProtocol != "h2" {
			t.Errorf("suite %x, protocol %q", s.CipherSuite, s.NegotiatedProtocol)
		}
		return conn.ConnectionState().PeerCertificates[0].SerialNumber.String()
	}
	before := served()
	if _, err := proxytest.Get(t, ca.Client(t, target, "api")); err != nil {
		t.Fatal(err)
	}

	// A key without its certificate: the pair that fits stays, and the failure is told.
	pair, err := os.ReadFile(key)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(key, []byte("half a file"), 0o600); err != nil {
		t.Fatal(err)
	}
	if served() != before {
		t.Error("a broken pair is served")
	}
	proxytest.Eventually(t, "the broken pair is logged", func() bool { return strings.Contains(p.logs.String(), "cannot be used") })
	if strings.Contains(p.logs.String(), "half a file") || strings.Contains(p.logs.String(), string(pair)) {
		t.Error("a key file is in the log")
	}
	_, _, leaf := ca.Issue("server", "server")
	if got := served(); got != leaf.SerialNumber.String() {
		t.Errorf("serial %s after the reload, want %s", got, leaf.SerialNumber)
	}

	// Revocation, and another CA for clients.
	c, k, revoked := ca.Issue("revoked", "revoked")
	ca.Revoke(crl, revoked)
	pairR, err := tls.LoadX509KeyPair(c, k)
	if err != nil {
		t.Fatal(err)
	}
	cfg := &tls.Config{RootCAs: x509.NewCertPool(), ServerName: "127.0.0.1", Certificates: []tls.Certificate{pairR}}
	cfg.RootCAs.AddCert(ca.Cert)
	if _, err := proxytest.Get(t, proxytest.Dial(t, target, grpc.WithTransportCredentials(credentials.NewTLS(cfg)))); status.Code(err) != codes.Unavailable {
		t.Errorf("a revoked client: %v", err)
	}
	if _, err := proxytest.Get(t, ca.Client(t, target, "api")); err != nil {
		t.Errorf("another client: %v", err)
	}
	other.Revoke(crl)
	proxytest.WritePEM(t, clientCAs, "CERTIFICATE", other.Cert.Raw)
	if _, err := proxytest.Get(t, ca.Client(t, target, "api")); status.Code(err) != codes.Unavailable {
		t.Errorf("a client of the old CA: %v", err)
	}
}

func TestListenerConfigErrors(t *testing.T) {
	ca, other := proxytest.NewAuthority(t, "ca"), proxytest.NewAuthority(t, "other")
	cert, key, _ := ca.Issue("server", "server")
	empty := filepath.Join(ca.Dir, "empty.pem")
	if err := os.WriteFile(empty, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	foreign := filepath.Join(ca.Dir, "foreign.pem")
	other.Revoke(foreign)
	taken := proxytest.ListenLoopback(t)
	defer taken.Close()
	for want, l := range map[string]listener.Config{
		"address already in use":     {Address: taken.Addr().String()},
		"need TLS with clientCAFile": {Address: "127.0.0.1:0", AllowedClients: []string{"a"}},
		"needs clientCAFile":         {Address: "127.0.0.1:0", TLS: &listener.TLS{CertFile: cert, KeyFile: key, ClientCRLFile: foreign}},
		"load certificate":           {Address: "127.0.0.1:0", TLS: &listener.TLS{CertFile: cert, KeyFile: cert}},
		"no such file":               {Address: "127.0.0.1:0", TLS: &listener.TLS{CertFile: "/nowhere", KeyFile: key}},
		"minVersion \"1.1\"":         {Address: "127.0.0.1:0", TLS: &listener.TLS{CertFile: cert, KeyFile: key, MinVersion: "1.1"}},
		"cipherSuites: \"X\"":        {Address: "127.0.0.1:0", TLS: &listener.TLS{CertFile: cert, KeyFile: key, CipherSuites: []string{"X"}}},
		"there is no certificate":    {Address: "127.0.0.1:0", TLS: &listener.TLS{CertFile: cert, KeyFile: key, ClientCAFile: empty}},
		"has signed it":              {Address: "127.0.0.1:0", TLS: &listener.TLS{CertFile: cert, KeyFile: key, ClientCAFile: ca.File, ClientCRLFile: foreign}},
		"parse revocation list":      {Address: "127.0.0.1:0", TLS: &listener.TLS{CertFile: cert, KeyFile: key, ClientCAFile: ca.File, ClientCRLFile: empty}},
		"must be absolute":           {Address: "unix://relative.sock"},
		"is not a socket":            {Address: "unix://" + empty},
	} {
		_, err := New(Config{Listeners: []listener.Config{l}, Upstream: upstream.Config{Endpoints: []string{"http://127.0.0.1:1"}}})
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %q", l, err, want)
		}
	}
}

func TestUnixSocket(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "etcd.sock")
	// A socket whose process died without removing it.
	dead, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	dead.SetUnlinkOnClose(false)
	dead.Close()
	etcd := proxytest.ServeFake(t, proxytest.EchoEtcd())
	p := startProxy(t, etcd, nil, func(c *Config) { c.Listeners[0] = listener.Config{Address: "unix://" + path} })
	info, err := os.Lstat(path)
	if err != nil || info.Mode().Perm() != 0o600 || info.Mode()&os.ModeSocket == 0 {
		t.Fatalf("%v, %v", info, err)
	}
	if got := p.Addrs()[0].String(); got != path {
		t.Errorf("address %q", got)
	}
	if _, err := proxytest.Get(t, dialUnix(t, path)); err != nil {
		t.Fatal(err)
	}
	_, err = New(Config{Listeners: []listener.Config{{Address: "unix://" + path}}, Upstream: upstream.Config{Endpoints: []string{"http://" + etcd}}})
	if !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a second proxy: %v", err)
	}
	if _, err := proxytest.Get(t, dialUnix(t, path)); err != nil {
		t.Errorf("after a second proxy tried: %v", err)
	}
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
	p = startProxy(t, etcd, nil, func(c *Config) { c.Listeners[0] = listener.Config{Address: "unix://" + path, Mode: 0o660} })
	if info, err := os.Lstat(path); err != nil || info.Mode().Perm() != 0o660 {
		t.Errorf("%v, %v", info, err)
	}
	// Another process' socket in the place of ours is not ours to remove.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	theirs, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	defer theirs.Close()
	if err := p.stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Error(err)
	}
}

func dialUnix(t *testing.T, path string) *grpc.ClientConn {
	return proxytest.Dial(t, path, grpc.WithTransportCredentials(proxytest.InsecureCredentials()), grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, "unix", path)
	}))
}

// TestListenerNeverOpen: whatever the process' umask is, a listener's socket can at no time be
// opened by others than its mode lets in.
func TestListenerNeverOpen(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0))
	dir := t.TempDir()
	stop := make(chan struct{})
	var watch sync.WaitGroup
	watch.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			entries, _ := os.ReadDir(dir)
			for _, e := range entries {
				// what is gone again is no one's to open
				if info, err := os.Lstat(filepath.Join(dir, e.Name())); err == nil && info.Mode().Perm()&0o077 != 0 {
					t.Errorf("%s has mode %v", e.Name(), info.Mode())
					return
				}
			}
		}
	})
	m, err := metrics.New(nil)
	if err != nil {
		t.Fatal(err)
	}
	for range 300 {
		l, err := listener.Listen(listener.Config{Address: "unix://" + filepath.Join(dir, "etcd.sock")}, slog.New(slog.DiscardHandler), m)
		if err != nil {
			t.Fatal(err)
		}
		_ = l.Close()
	}
	close(stop)
	watch.Wait()
}

// TestHealthChecks: a connection on which the client sends nothing is neither counted nor logged,
// however it ends. One on which it tried something is.
func TestHealthChecks(t *testing.T) {
	ca := proxytest.NewAuthority(t, "ca")
	cert, key, _ := ca.Issue("server", "server")
	reset := func(c net.Conn) { _ = c.(*net.TCPConn).SetLinger(0) }
	finish := func(c net.Conn) { _ = c.(*net.TCPConn).CloseWrite(); _, _ = io.Copy(io.Discard, c) }
	for name, tt := range map[string]struct {
		tls  bool
		do   func(net.Conn)
		want float64
	}{
		"connect and close":                     {false, func(net.Conn) {}, 0},
		"connect and reset":                     {false, reset, 0},
		"connect, half close":                   {false, finish, 0},
		"half a preface":                        {false, func(c net.Conn) { _, _ = io.WriteString(c, "PR"); finish(c) }, 1},
		"TLS, connect and close":                {true, func(net.Conn) {}, 0},
		"TLS, connect and reset":                {true, reset, 0},
		"TLS, connect, half close":              {true, finish, 0},
		"TLS, one byte":                         {true, func(c net.Conn) { _, _ = io.WriteString(c, "\x16"); finish(c) }, 1},
		"TLS, cleartext":                        {true, func(c net.Conn) { _, _ = io.WriteString(c, "PRI"); finish(c) }, 1},
		"TLS, handshake and close":              {true, func(c net.Conn) { handshake(t, ca, c, "client") }, 0},
		"TLS, handshake, no client certificate": {true, func(c net.Conn) { handshake(t, ca, c, ""); finish(c) }, 1},
	} {
		t.Run(name, func(t *testing.T) {
			logs := &proxytest.LogBuffer{}
			m, err := metrics.New(nil)
			if err != nil {
				t.Fatal(err)
			}
			cfg := listener.Config{Address: "127.0.0.1:0"}
			if tt.tls {
				cfg.TLS = &listener.TLS{CertFile: cert, KeyFile: key, ClientCAFile: ca.File}
			}
			l, err := listener.Listen(cfg, slog.New(slog.NewJSONHandler(logs, nil)), m)
			if err != nil {
				t.Fatal(err)
			}
			done, served := make(chan struct{}), make(chan struct{}, 2)
			go func() {
				defer close(done)
				l.Run(context.Background(), func(c *listener.Conn) {
					served <- struct{}{}
					_, _ = io.Copy(io.Discard, c)
					_ = c.Close()
				})
			}()
			conn := connect(t, l)
			tt.do(conn)
			_ = conn.Close()
			// A client that is served was accepted after the first.
			conn = connect(t, l)
			if tt.tls {
				conn = tls.Client(conn, ca.ClientConfig(t, "client"))
			}
			if _, err := io.WriteString(conn, "GET"); err != nil {
				t.Fatal(err)
			}
			<-served
			_ = conn.Close()
			_ = l.Close()
			<-done // when every handshake has ended
			if got := testutil.ToFloat64(m.HandshakeFailures.WithLabelValues(cfg.Address)); got != tt.want {
				t.Errorf("%v are counted, want %v", got, tt.want)
			}
			if logged := strings.Contains(logs.String(), "connection rejected"); logged != (tt.want > 0) {
				t.Errorf("logged: %s", logs.String())
			}
		})
	}
}

func connect(t *testing.T, l *listener.Listener) net.Conn {
	t.Helper()
	conn, err := net.Dial("tcp", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return conn
}

// handshake does a TLS handshake over conn as the client of a name, or without a certificate if
// there is none, which the server refuses later.
func handshake(t *testing.T, ca *proxytest.Authority, conn net.Conn, name string) {
	t.Helper()
	if err := tls.Client(conn, ca.ClientConfig(t, name)).HandshakeContext(t.Context()); err != nil {
		t.Errorf("handshake: %v", err)
	}
}
