package differential

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestEtcdOutage checks that the proxy starts before etcd, reports it, and serves as soon as etcd
// does, and that it survives a restart of etcd.
func TestEtcdOutage(t *testing.T) {
	t.Parallel()
	env := harness.New(t)
	address := harness.FreeAddress(t)
	p := env.StartProxy("proxy", harness.ProxyConfig{
		Coordination: harness.NoCoordination(),
		Etcd:         harness.Upstream{Endpoints: []string{"http://" + address}}, KMS: []harness.KMSConfig{env.LocalKey(provider, 1)}, Rules: ruleSets[0].rules,
	})
	kv := pb.NewKVClient(harness.Dial(t, p.Address, nil))
	put := func(within time.Duration) error {
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		_, err := kv.Put(ctx, &pb.PutRequest{Key: []byte("k"), Value: []byte(env.Sealed.Value("v"))})
		return err
	}
	refused := func() {
		t.Helper()
		// The error may depend on the client's deadline, but the write must never be reported as
		// done.
		if code := status.Code(put(time.Second)); code != codes.Unavailable && code != codes.DeadlineExceeded {
			t.Errorf("a put without etcd: %v, want Unavailable or DeadlineExceeded", code)
		}
		harness.Eventually(t, 10*time.Second, "/readyz to say that etcd is away", func() error {
			if p.Ready() == nil {
				return fmt.Errorf("it says that all is well")
			}
			return p.Alive()
		})
	}
	back := func() {
		t.Helper()
		start := time.Now()
		harness.Eventually(t, 10*time.Second, "a put", func() error { return put(5 * time.Second) })
		// Reconnecting takes tenths of a second, and not the minutes of gRPC's default backoff.
		if took := time.Since(start); took > 4*time.Second {
			t.Errorf("the first put after etcd's start took %v", took)
		}
		p.WaitReady(10 * time.Second)
	}
	refused()
	etcd := env.StartEtcd(harness.EtcdConfig{Address: address})
	back()
	etcd.Kill()
	refused()
	etcd.Start()
	back()
}

// gate lets a client read from its connections until, once armed, they have returned more than a
// limit together. The read that exceeds it waits until the gate is opened.
type gate struct {
	mu      sync.Mutex
	left    int           // bytes; negative while it is not armed
	reached chan struct{} // closed when the limit is reached
	open    chan struct{} // closed when the gate is opened
}

// arm returns when the gate is closed after n more bytes.
func (g *gate) arm(n int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.left, g.reached, g.open = n, make(chan struct{}), make(chan struct{})
}

// dial connects with reads that wait at the gate.
func (g *gate) dial(ctx context.Context, address string) (net.Conn, error) {
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return &gatedConn{Conn: conn, gate: g}, nil
}

type gatedConn struct {
	net.Conn
	gate *gate
}

// Read implements net.Conn.
func (c *gatedConn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	g := c.gate
	g.mu.Lock()
	var wait chan struct{}
	if g.left >= 0 {
		if g.left -= n; g.left < 0 {
			wait = g.open
			close(g.reached)
		}
	}
	g.mu.Unlock()
	if wait != nil {
		<-wait
	}
	return n, err
}

// TestEtcdGoesWithinAResponse: etcd is killed while the client has a part of a long response. The
// client gets the same error through a proxy as from etcd, and etcd's Go client repeats the call
// after it.
func TestEtcdGoesWithinAResponse(t *testing.T) {
	t.Parallel()
	env := harness.New(t)
	etcd := env.StartEtcd(harness.EtcdConfig{})
	p := env.StartProxy("proxy", harness.ProxyConfig{
		Coordination: harness.NoCoordination(), Etcd: harness.Upstream{Endpoints: []string{etcd.URL}},
		KMS: []harness.KMSConfig{env.LocalKey(provider, 1)}, Rules: []harness.Rule{{Prefix: "other/", WriteWith: provider}},
	})
	const keys = 16
	value := strings.Repeat("x", 512<<10)
	direct := pb.NewKVClient(harness.Dial(t, etcd.Address, nil))
	for i := range keys {
		if _, err := direct.Put(t.Context(), &pb.PutRequest{Key: fmt.Appendf(nil, "k%02d", i), Value: []byte(value)}); err != nil {
			t.Fatal(err)
		}
	}
	for name, address := range map[string]string{"etcd": etcd.Address, "the proxy": p.Address} {
		g := &gate{left: -1}
		client, err := clientv3.New(clientv3.Config{
			Endpoints: []string{address}, DialOptions: []grpc.DialOption{grpc.WithContextDialer(g.dial)},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		once := func(ctx context.Context) error {
			_, err := pb.NewKVClient(client.ActiveConnection()).Range(ctx, &pb.RangeRequest{Key: []byte("k"), RangeEnd: []byte("l")}, grpc.MaxCallRecvMsgSize(keys<<20))
			return err
		}
		again := func(ctx context.Context) error {
			res, err := client.Get(ctx, "k", clientv3.WithPrefix())
			if err == nil && (len(res.Kvs) != keys || string(res.Kvs[keys-1].Value) != value) {
				err = fmt.Errorf("%d keys", len(res.Kvs))
			}
			return err
		}
		for _, call := range []struct {
			what string
			do   func(context.Context) error
			want codes.Code
		}{{"one call", once, codes.Unavailable}, {"a call of etcd's client", again, codes.OK}} {
			ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
			defer cancel()
			if err := again(ctx); err != nil { // it is connected
				t.Fatalf("%s: %v", name, err)
			}
			g.arm(1 << 20)
			done := make(chan error, 1)
			go func() { done <- call.do(ctx) }()
			select {
			case <-g.reached:
			case err := <-done:
				t.Fatalf("%s: %s ended before it had 1 MiB: %v", name, call.what, err)
			}
			etcd.Kill()
			etcd.Start()
			close(g.open)
			err := <-done
			if status.Code(err) != call.want {
				t.Errorf("%s: %s: %v, want %v", name, call.what, err, call.want)
			}
			t.Logf("%s: %s: %v", name, call.what, err)
		}
	}
}
