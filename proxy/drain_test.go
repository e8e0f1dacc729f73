package proxy

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/connectivity"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
)

func putEtcd(t *testing.T) string {
	return proxytest.ServeFake(t, &proxytest.FakeEtcd{PutFn: func(context.Context, *pb.PutRequest) (*pb.PutResponse, error) {
		return &pb.PutResponse{}, nil
	}})
}

// TestDrainWhileCallsWaitForTheGate: a proxy that is stopped right after its start still serves the
// calls that wait for the start's checks. A client does not repeat a write that was refused.
func TestDrainWhileCallsWaitForTheGate(t *testing.T) {
	ctx, gate := proxytest.TestContext(t), make(chan struct{})
	p := startProxy(t, putEtcd(t), nil, func(c *Config) { c.Gate = gate })
	conn := p.dial(t)
	put, err := conn.NewStream(ctx, &grpc.StreamDesc{}, pb.KV_Put_FullMethodName)
	if err != nil {
		t.Fatal(err)
	}
	if err := put.SendMsg(&pb.PutRequest{Key: []byte("k")}); err != nil {
		t.Fatal(err)
	}
	// It has arrived when a later call on its connection has.
	if err := conn.Invoke(ctx, "/etcdserverpb.KV/Unknown", &pb.PutRequest{}, &pb.PutResponse{}); status.Code(err) != codes.Unimplemented {
		t.Fatal(err)
	}
	go func() { _ = p.stop() }()
	if !conn.WaitForStateChange(ctx, connectivity.Ready) {
		t.Fatal("the proxy does not ask the client to go elsewhere")
	}
	close(gate)
	if err := put.RecvMsg(&pb.PutResponse{}); err != nil {
		t.Error(err)
	}
}

// observedSocket tells of each connection that was accepted, and of its end.
type observedSocket struct {
	net.Listener
	accepted chan struct{}
	close    func()
	closed   context.Context
}

func (s *observedSocket) Accept() (net.Conn, error) {
	conn, err := s.Listener.Accept()
	if err == nil {
		s.accepted <- struct{}{}
	}
	return conn, err
}

func (s *observedSocket) Close() error {
	s.close()
	return s.Listener.Close()
}

// TestDrainWhileClientsConnect: a connection that was accepted just before the drain does not fail.
// Over HTTP its request is served. Over gRPC the client is asked to go elsewhere, and does.
func TestDrainWhileClientsConnect(t *testing.T) {
	type dialer = func(context.Context) (net.Conn, error)
	for protocol, put := range map[string]func(context.Context, *testing.T, dialer) error{
		"gRPC": func(ctx context.Context, t *testing.T, dial dialer) error {
			conn := proxytest.Dial(t, "passthrough:///proxy", grpc.WithTransportCredentials(proxytest.InsecureCredentials()),
				grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return dial(ctx) }))
			_, err := pb.NewKVClient(conn).Put(ctx, &pb.PutRequest{Key: []byte("k")})
			return err
		},
		"HTTP": func(ctx context.Context, _ *testing.T, dial dialer) error {
			transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) { return dial(ctx) }}
			defer transport.CloseIdleConnections()
			r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://localhost/v3/kv/put", strings.NewReader(`{"key":"aw=="}`))
			if err != nil {
				return err
			}
			response, err := transport.RoundTrip(r)
			if err != nil {
				return err
			}
			defer response.Body.Close()
			if response.StatusCode != http.StatusOK {
				return errors.New(response.Status)
			}
			return nil
		},
	} {
		t.Run(protocol, func(t *testing.T) {
			socket := &observedSocket{Listener: proxytest.ListenLoopback(t), accepted: make(chan struct{}, 1)}
			socket.closed, socket.close = context.WithCancel(t.Context())
			p := startProxy(t, putEtcd(t), nil, func(c *Config) {
				c.Listeners = []listener.Config{{Address: "systemd://etcd", Sockets: []net.Listener{socket}}}
			})
			proxytest.Eventually(t, "a connection to etcd", p.upstream.Connected.Load)
			elsewhere := startProxy(t, putEtcd(t), nil, nil).Addrs()[0].String()
			err := put(proxytest.TestContext(t), t, func(ctx context.Context) (net.Conn, error) {
				if socket.closed.Err() != nil {
					return (&net.Dialer{}).DialContext(ctx, "tcp", elsewhere)
				}
				conn, err := (&net.Dialer{}).DialContext(ctx, "tcp", socket.Addr().String())
				if err != nil {
					return nil, err
				}
				proxytest.Wait(t, socket.accepted, "the proxy to accept")
				go func() { _ = p.stop() }()
				proxytest.Wait(t, socket.closed.Done(), "the drain")
				return conn, nil
			})
			if err != nil {
				t.Error(err)
			}
		})
	}
}

// TestDrainClosesHTTPConnections: a client that sends one request after the other over HTTP/1 is
// notified by a response that its connection closes. No request is lost.
func TestDrainClosesHTTPConnections(t *testing.T) {
	p := startProxy(t, putEtcd(t), nil, nil)
	proxytest.Eventually(t, "a connection to etcd", p.upstream.Connected.Load)
	transport := &http.Transport{}
	defer transport.CloseIdleConnections()
	ctx, address := proxytest.TestContext(t), p.Addrs()[0].String()
	for i := 0; ; i++ {
		r, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://"+address+"/v3/kv/put", strings.NewReader(`{"key":"aw=="}`))
		if err != nil {
			t.Fatal(err)
		}
		response, err := transport.RoundTrip(r)
		if err != nil {
			t.Fatalf("request %d: %v", i, err)
		}
		_, _ = io.Copy(io.Discard, response.Body)
		_ = response.Body.Close()
		if response.StatusCode != http.StatusOK {
			t.Fatalf("request %d: %s", i, response.Status)
		}
		if response.Close {
			return
		}
		if i == 10 {
			go func() { _ = p.stop() }()
		}
	}
}
