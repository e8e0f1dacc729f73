package proxy

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"slices"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// patience bounds every wait for something that must happen.
const patience = time.Minute

// reverser is a Sealer that anyone can check by eye: what is stored is the value backwards, behind a mark and the key.
type reverser struct {
	openErr, sealErr error
}

func (r reverser) Seal(_ context.Context, key, value []byte) ([]byte, error) {
	if r.sealErr != nil {
		return nil, r.sealErr
	}
	out := append([]byte("sealed:"), key...)
	out = append(out, ':')
	back := bytes.Clone(value)
	slices.Reverse(back)
	return append(out, back...), nil
}

func (r reverser) Open(_ context.Context, key, stored []byte) ([]byte, error) {
	if r.openErr != nil {
		return nil, r.openErr
	}
	rest, ok := bytes.CutPrefix(stored, append(append([]byte("sealed:"), key...), ':'))
	if !ok {
		return nil, errors.New("not what Seal wrote")
	}
	out := bytes.Clone(rest)
	slices.Reverse(out)
	return out, nil
}

func (r reverser) TrySeal(key, value []byte) ([]byte, error) {
	return r.Seal(context.Background(), key, value)
}

func (r reverser) TryOpen(key, stored []byte) ([]byte, error) {
	return r.Open(context.Background(), key, stored)
}

func (reverser) Ready([]byte) bool { return true }

// sealed is what etcd holds for value.
func sealed(key, value string) []byte {
	out, _ := reverser{}.Seal(context.Background(), []byte(key), []byte(value))
	return out
}

// fakeEtcd is an etcd whose answers the test writes. A nil function is a method that is not implemented.
type fakeEtcd struct {
	pb.UnimplementedKVServer
	pb.UnimplementedWatchServer
	pb.UnimplementedLeaseServer
	pb.UnimplementedMaintenanceServer
	rangeFn   func(context.Context, *pb.RangeRequest) (*pb.RangeResponse, error)
	streamFn  func(*pb.RangeRequest, grpc.ServerStreamingServer[pb.RangeStreamResponse]) error
	putFn     func(context.Context, *pb.PutRequest) (*pb.PutResponse, error)
	deleteFn  func(context.Context, *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error)
	txnFn     func(context.Context, *pb.TxnRequest) (*pb.TxnResponse, error)
	watchFn   func(grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error
	keepAlive func(grpc.BidiStreamingServer[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]) error
}

func (f *fakeEtcd) Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	if f.rangeFn == nil {
		return f.UnimplementedKVServer.Range(ctx, r)
	}
	return f.rangeFn(ctx, r)
}

func (f *fakeEtcd) RangeStream(r *pb.RangeRequest, s grpc.ServerStreamingServer[pb.RangeStreamResponse]) error {
	if f.streamFn == nil {
		return f.UnimplementedKVServer.RangeStream(r, s)
	}
	return f.streamFn(r, s)
}

func (f *fakeEtcd) Put(ctx context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
	if f.putFn == nil {
		return f.UnimplementedKVServer.Put(ctx, r)
	}
	return f.putFn(ctx, r)
}

func (f *fakeEtcd) DeleteRange(ctx context.Context, r *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
	if f.deleteFn == nil {
		return f.UnimplementedKVServer.DeleteRange(ctx, r)
	}
	return f.deleteFn(ctx, r)
}

func (f *fakeEtcd) Txn(ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	if f.txnFn == nil {
		return f.UnimplementedKVServer.Txn(ctx, r)
	}
	return f.txnFn(ctx, r)
}

func (f *fakeEtcd) Watch(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
	if f.watchFn == nil {
		return f.UnimplementedWatchServer.Watch(s)
	}
	return f.watchFn(s)
}

func (f *fakeEtcd) LeaseKeepAlive(s grpc.BidiStreamingServer[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]) error {
	if f.keepAlive == nil {
		return f.UnimplementedLeaseServer.LeaseKeepAlive(s)
	}
	return f.keepAlive(s)
}

// serveFake starts f on loopback and returns its address.
func serveFake(t testing.TB, f *fakeEtcd, opts ...grpc.ServerOption) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serveFakeOn(t, f, l, opts...)
	return l.Addr().String()
}

func serveFakeOn(t testing.TB, f *fakeEtcd, l net.Listener, opts ...grpc.ServerOption) {
	t.Helper()
	s := grpc.NewServer(append([]grpc.ServerOption{grpc.MaxRecvMsgSize(1 << 30), grpc.MaxSendMsgSize(1 << 30), grpc.WaitForHandlers(true)}, opts...)...)
	pb.RegisterKVServer(s, f)
	pb.RegisterWatchServer(s, f)
	pb.RegisterLeaseServer(s, f)
	pb.RegisterMaintenanceServer(s, f)
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = s.Serve(l)
	}()
	t.Cleanup(func() { s.Stop(); <-done })
}

// running is a proxy that serves, and how to end it.
type running struct {
	*Proxy
	stop func() error // ends Run and returns what it returned; may be called again
	logs *logBuffer
}

// startProxy runs a proxy before the etcd at address. edit may change the configuration; by default it listens on loopback.
func startProxy(t testing.TB, etcd string, rules []Rule, edit func(*Config)) *running {
	t.Helper()
	return startRelaying(t, etcd, rules, edit, os.Getenv("PROXY_TEST_CALLS") != "handled") // what holds for relayed calls holds for handled ones
}

// startRelaying is startProxy for a proxy that relays calls, or has all of them handled.
func startRelaying(t testing.TB, etcd string, rules []Rule, edit func(*Config), relays bool) *running {
	t.Helper()
	logs := &logBuffer{}
	cfg := Config{
		Listeners: []ListenerConfig{{Address: "127.0.0.1:0"}},
		Upstream:  UpstreamConfig{Endpoints: []string{"http://" + etcd}},
		Rules:     rules,
		Logger:    slog.New(slog.NewJSONHandler(logs, nil)),
	}
	if edit != nil {
		edit(&cfg)
	}
	p, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range p.api.methods {
		m.relayed = m.relayed && relays
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- p.Run(ctx) }()
	stop := sync.OnceValue(func() error { cancel(); return <-ended })
	t.Cleanup(func() {
		if err := stop(); err != nil {
			t.Errorf("Run: %v", err)
		}
	})
	return &running{Proxy: p, stop: stop, logs: logs}
}

// dial connects to the proxy's first listener in cleartext.
func (r *running) dial(t *testing.T, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	return dial(t, r.Addrs()[0].String(), append([]grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}, opts...)...)
}

func dial(t testing.TB, target string, opts ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+target, append([]grpc.DialOption{
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(1<<30), grpc.MaxCallSendMsgSize(1<<30)),
	}, opts...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}

func testContext(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	t.Cleanup(cancel)
	return ctx
}

// eventually polls until ok, or fails the test.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never happened: %s", what)
		}
	}
}

func wait[T any](t *testing.T, c <-chan T, what string) T {
	t.Helper()
	select {
	case v := <-c:
		return v
	case <-time.After(patience):
		t.Fatalf("never happened: %s", what)
		panic("unreachable")
	}
}

type logBuffer struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.buf.String()
}

func listenLoopback(t testing.TB) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func dialInsecure(t *testing.T, address string) *grpc.ClientConn {
	return dial(t, address, grpc.WithTransportCredentials(insecure.NewCredentials()))
}

func insecureCredentials() credentials.TransportCredentials { return insecure.NewCredentials() }
