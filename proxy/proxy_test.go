package proxy

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
	"github.com/prometheus/client_golang/prometheus/testutil"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

func TestDrain(t *testing.T) {
	arrived, release := make(chan struct{}, 1), make(chan struct{})
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{
		RangeFn: func(context.Context, *pb.RangeRequest) (*pb.RangeResponse, error) {
			arrived <- struct{}{}
			<-release
			return &pb.RangeResponse{Count: 3}, nil
		},
		WatchFn: func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
			if err := s.Send(&pb.WatchResponse{Created: true}); err != nil {
				return err
			}
			<-s.Context().Done()
			return nil
		},
		KeepAlive: func(s grpc.BidiStreamingServer[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]) error {
			<-s.Context().Done()
			return nil
		},
	})
	p := startProxy(t, etcd, everything, nil)
	conn := p.dial(t)
	w, err := pb.NewWatchClient(conn).Watch(proxytest.TestContext(t))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Recv(); err != nil {
		t.Fatal(err)
	}
	k, err := pb.NewLeaseClient(conn).LeaseKeepAlive(proxytest.TestContext(t))
	if err != nil {
		t.Fatal(err)
	}
	answered := make(chan error, 1)
	go func() {
		r, err := pb.NewKVClient(conn).Range(proxytest.TestContext(t), &pb.RangeRequest{Key: []byte("k")})
		if err == nil && r.Count != 3 {
			t.Errorf("got %v", r)
		}
		answered <- err
	}()
	proxytest.Wait(t, arrived, "unary call")
	stopped := make(chan error, 1)
	go func() { stopped <- p.stop() }()
	_, err = w.Recv()
	proxytest.SameStatus(t, err, status.Error(codes.Unavailable, "etcd-kms-proxy: shutting down"))
	if _, err = k.Recv(); status.Code(err) != codes.Unavailable {
		t.Errorf("keep-alive: %v", err)
	}
	proxytest.Eventually(t, "no new connections", func() bool {
		c, err := net.Dial("tcp", p.Addrs()[0].String())
		if err == nil {
			c.Close()
		}
		return err != nil
	})
	select {
	case err := <-stopped:
		t.Fatalf("Run ended with a call in flight: %v", err)
	default:
	}
	close(release)
	if err := proxytest.Wait(t, answered, "answer of the unary call"); err != nil {
		t.Errorf("the call in flight: %v", err)
	}
	if err := proxytest.Wait(t, stopped, "end of Run"); err != nil {
		t.Error(err)
	}
}

// TestDrainWhileWatchesBegin: a watch that begins while the proxy drains ends too, whichever of the
// two comes first.
func TestDrainWhileWatchesBegin(t *testing.T) {
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{
		WatchFn: func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
			<-s.Context().Done()
			return nil
		},
	})
	p := startProxy(t, etcd, nil, nil)
	var all sync.WaitGroup
	begun := make(chan struct{}, 8)
	for range cap(begun) {
		watch := pb.NewWatchClient(p.dial(t))
		all.Go(func() {
			for n := 0; ; n++ {
				w, err := watch.Watch(proxytest.TestContext(t))
				if n == 20 {
					begun <- struct{}{}
				}
				if err != nil {
					return
				}
				all.Go(func() {
					if _, err := w.Recv(); status.Code(err) != codes.Unavailable {
						t.Errorf("the watch ended with %v", err)
					}
				})
			}
		})
	}
	for range cap(begun) {
		proxytest.Wait(t, begun, "watches")
	}
	if err := p.stop(); err != nil {
		t.Error(err)
	}
	all.Wait()
}

func TestDrainTimeout(t *testing.T) {
	arrived := make(chan struct{}, 1)
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{RangeFn: func(ctx context.Context, _ *pb.RangeRequest) (*pb.RangeResponse, error) {
		arrived <- struct{}{}
		<-ctx.Done()
		return nil, ctx.Err()
	}})
	p := startProxy(t, etcd, nil, func(c *Config) { c.DrainTimeout = 50 * time.Millisecond })
	failed := make(chan error, 1)
	conn := p.dial(t)
	go func() {
		_, err := pb.NewKVClient(conn).Range(proxytest.TestContext(t), &pb.RangeRequest{Key: []byte("k")})
		failed <- err
	}()
	proxytest.Wait(t, arrived, "call")
	if err := p.stop(); err != nil {
		t.Error(err)
	}
	if err := proxytest.Wait(t, failed, "end of the call"); status.Code(err) != codes.Unavailable {
		t.Errorf("got %v", err)
	}
}

// TestEtcdComesLate starts the proxy before etcd: the first request is served as soon as etcd is
// there, none fails for being early, and one that nobody serves fails with Unavailable within a
// bounded time.
func TestEtcdComesLate(t *testing.T) {
	l := proxytest.ListenLoopback(t)
	address := l.Addr().String()
	l.Close()
	p := startProxy(t, address, everything, nil)
	conn := p.dial(t)
	began := time.Now()
	_, err := proxytest.Get(t, conn)
	if st := status.Convert(err); st.Code() != codes.Unavailable || !strings.HasPrefix(st.Message(), "etcd-kms-proxy: etcd is unreachable: ") {
		t.Errorf("without etcd: %v", err)
	}
	if d := time.Since(began); d > upstream.ConnectWait+2*time.Second {
		t.Errorf("it took %v to say so", d)
	}
	proxytest.Eventually(t, "the log says that etcd is unreachable", func() bool { return strings.Contains(p.logs.String(), "etcd is unreachable; the proxy keeps trying") })
	got := make(chan error, 1)
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), proxytest.Patience)
		defer cancel()
		var err error
		for range 3 { // a backed-off connection may need more than one readyWait
			if _, err = pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte("k")}); err == nil {
				break
			}
		}
		got <- err
	}()
	if l, err = net.Listen("tcp", address); err != nil {
		t.Fatal(err)
	}
	proxytest.ServeFakeOn(t, proxytest.EchoEtcd(), l)
	if err := proxytest.Wait(t, got, "answer"); err != nil {
		t.Error(err)
	}
	proxytest.Eventually(t, "the log says that etcd is back", func() bool { return strings.Contains(p.logs.String(), "etcd is reachable again") })
	if r := p.Ready(); !r.Ready || !r.Checks[1].OK {
		t.Errorf("ready: %+v", r)
	}
}

func TestEndpoints(t *testing.T) {
	a, b := proxytest.EchoEtcd(), proxytest.EchoEtcd()
	counts := make(chan string, 100)
	for name, f := range map[string]*proxytest.FakeEtcd{"a": a, "b": b} {
		f.RangeFn = func(context.Context, *pb.RangeRequest) (*pb.RangeResponse, error) {
			counts <- name
			return &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{{}}}, nil
		}
	}
	dead := proxytest.ListenLoopback(t)
	dead.Close()
	endpoints := []string{"http://" + proxytest.ServeFake(t, a), "http://" + proxytest.ServeFake(t, b), "http://" + dead.Addr().String()}
	conn := startProxy(t, "", nil, func(c *Config) { c.Upstream.Endpoints = endpoints }).dial(t)
	seen := map[string]bool{}
	proxytest.Eventually(t, "both members are asked, and the dead one is not", func() bool {
		if _, err := proxytest.Get(t, conn); err != nil {
			t.Fatal(err)
		}
		seen[<-counts] = true
		return len(seen) == 2
	})

	path := filepath.Join(t.TempDir(), "etcd.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	proxytest.ServeFakeOn(t, proxytest.EchoEtcd(), l)
	conn = startProxy(t, "", everything, func(c *Config) { c.Upstream.Endpoints = []string{"unix://" + path} }).dial(t)
	if v, err := proxytest.Get(t, conn); err != nil || v != "v" {
		t.Errorf("over a socket: %q, %v", v, err)
	}

	for want, u := range map[string]upstream.Config{
		"there is none":            {},
		"some with TLS":            {Endpoints: []string{"https://a:1", "http://b:1"}},
		"certFile and keyFile":     {Endpoints: []string{"https://a:1"}, TLS: &upstream.TLS{CertFile: "x"}},
		"TLS files: stat /nowhere": {Endpoints: []string{"a:1"}, TLS: &upstream.TLS{CAFile: "/nowhere"}},
	} {
		if _, err := New(Config{Listeners: []listener.Config{{Address: "127.0.0.1:0"}}, Upstream: u}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v", u, err)
		}
	}
}

func TestUpstreamTLS(t *testing.T) {
	ca, other := proxytest.NewAuthority(t, "ca"), proxytest.NewAuthority(t, "other")
	cert, key, _ := ca.Issue("etcd", "etcd")
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	clients := x509.NewCertPool()
	clients.AddCert(ca.Cert)
	serverTLS := &tls.Config{Certificates: []tls.Certificate{pair}, ClientCAs: clients, ClientAuth: tls.RequireAndVerifyClientCert}
	l := proxytest.ListenLoopback(t)
	proxytest.ServeFakeOn(t, proxytest.EchoEtcd(), l, grpc.Creds(credentials.NewTLS(serverTLS)))
	cert, key, _ = other.Issue("proxy", "") // not yet one that etcd trusts
	p := startProxy(t, "", nil, func(c *Config) {
		c.Upstream = upstream.Config{Endpoints: []string{"https://" + l.Addr().String()}, TLS: &upstream.TLS{CAFile: ca.File, CertFile: cert, KeyFile: key}}
	})
	conn := p.dial(t)
	if _, err := proxytest.Get(t, conn); status.Code(err) != codes.Unavailable {
		t.Errorf("with a certificate that etcd does not trust: %v", err)
	}
	// The files are replaced; the next connection is made with them.
	ca.Dir = other.Dir
	ca.Issue("proxy", "")
	proxytest.Eventually(t, "the new certificate is used", func() bool { _, err := proxytest.Get(t, conn); return err == nil })

	// etcd's certificate is verified against the endpoint's own host.
	_, port, _ := net.SplitHostPort(l.Addr().String())
	p = startProxy(t, "", nil, func(c *Config) {
		c.Upstream = upstream.Config{Endpoints: []string{"https://localhost:" + port}, TLS: &upstream.TLS{CAFile: ca.File, CertFile: cert, KeyFile: key}}
	})
	if _, err := proxytest.Get(t, p.dial(t)); !strings.Contains(status.Convert(err).Message(), "localhost") {
		t.Errorf("got %v", err)
	}
	p = startProxy(t, "", nil, func(c *Config) {
		c.Upstream = upstream.Config{Endpoints: []string{"https://localhost:" + port}, TLS: &upstream.TLS{CAFile: ca.File, CertFile: cert, KeyFile: key, ServerName: "127.0.0.1"}}
	})
	if _, err := proxytest.Get(t, p.dial(t)); err != nil {
		t.Error(err)
	}

	cert, key, _ = other.Issue("named", "someone")
	p = startProxy(t, "", nil, func(c *Config) {
		c.Upstream = upstream.Config{Endpoints: []string{"https://" + l.Addr().String()}, TLS: &upstream.TLS{CAFile: ca.File, CertFile: cert, KeyFile: key}}
	})
	if !strings.Contains(p.logs.String(), `"commonName":"someone"`) {
		t.Errorf("no word of the certificate's name: %s", p.logs)
	}
}

func TestMetricsOfCalls(t *testing.T) {
	reg := prometheus.NewRegistry()
	p := startProxy(t, proxytest.ServeFake(t, proxytest.EchoEtcd()), everything, func(c *Config) { c.Registerer = reg })
	conn := p.dial(t)
	if _, err := proxytest.Get(t, conn); err != nil {
		t.Fatal(err)
	}
	for _, m := range []string{"/etcdserverpb.KV/X1", "/etcdserverpb.KV/X2", "/etcdserverpb.Lease/LeaseLeases"} {
		_, _ = proxytest.RawCall(proxytest.TestContext(t), conn, m, nil) // unimplemented, all three
	}
	scrape := func() string {
		w := httptest.NewRecorder()
		promhttp.HandlerFor(reg, promhttp.HandlerOpts{}).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/metrics", nil))
		return w.Body.String()
	}
	body := scrape()
	for _, line := range []string{
		`etcd_kms_proxy_requests_total{code="OK",method="/etcdserverpb.KV/Range"} 1`,
		`etcd_kms_proxy_requests_total{code="Unimplemented",method="unknown"} 2`,
		`etcd_kms_proxy_requests_total{code="Unimplemented",method="/etcdserverpb.Lease/LeaseLeases"} 1`,
		`etcd_kms_proxy_connections{listener="127.0.0.1:0"} 1`,
		`etcd_kms_proxy_etcd_connected 1`,
		`grpc_server_handled_total{grpc_code="OK",grpc_method="Range",grpc_service="etcdserverpb.KV",grpc_type="unary"} 1`,
		`grpc_server_started_total{grpc_method="Watch",grpc_service="etcdserverpb.Watch",grpc_type="bidi_stream"} 0`,
	} {
		if !strings.Contains(body, line+"\n") {
			t.Errorf("no line %q", line)
		}
	}
	if problems, err := testutil.GatherAndLint(reg, "etcd_kms_proxy_requests_total", "etcd_kms_proxy_connections"); err != nil || len(problems) > 0 {
		t.Errorf("%v, %v", problems, err)
	}
	conn.Close()
	proxytest.Eventually(t, "the connection is gone from the gauge", func() bool {
		return strings.Contains(scrape(), `etcd_kms_proxy_connections{listener="127.0.0.1:0"} 0`)
	})
}

// TestEtcdClient drives the proxy with etcd's own client: it survives a restart of the proxy with
// its watch.
func TestEtcdClient(t *testing.T) {
	events := make(chan *mvccpb.Event, 1)
	etcd := proxytest.ServeFake(t, &proxytest.FakeEtcd{
		WatchFn: func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
			if _, err := s.Recv(); err != nil {
				return err
			}
			if err := s.Send(&pb.WatchResponse{Created: true, Header: &pb.ResponseHeader{Revision: 1}}); err != nil {
				return err
			}
			for {
				select {
				case ev := <-events:
					if err := s.Send(&pb.WatchResponse{Header: &pb.ResponseHeader{Revision: ev.Kv.ModRevision}, Events: []*mvccpb.Event{ev}}); err != nil {
						return err
					}
				case <-s.Context().Done():
					return nil
				}
			}
		},
	})
	path := filepath.Join(t.TempDir(), "p.sock")
	start := func() *running {
		return startProxy(t, etcd, everything, func(c *Config) { c.Listeners[0] = listener.Config{Address: "unix://" + path} })
	}
	p := start()
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{"unix://" + path}, Logger: zap.NewNop()})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	watch := client.Watch(proxytest.TestContext(t), "k")
	for rev := int64(2); rev <= 3; rev++ {
		events <- &mvccpb.Event{Kv: &mvccpb.KeyValue{Key: []byte("k"), Value: proxytest.Sealed("k", "v"), ModRevision: rev}}
		r := proxytest.Wait(t, watch, "event")
		if r.Err() != nil || string(r.Events[0].Kv.Value) != "v" {
			t.Fatalf("got %+v, %v", r, r.Err())
		}
		if err := p.stop(); err != nil {
			t.Fatal(err)
		}
		p = start()
	}
}
