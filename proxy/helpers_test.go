package proxy

import (
	"context"
	"log/slog"
	"os"
	"sync"
	"testing"

	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// running is a proxy that serves, and how to end it.
type running struct {
	*Proxy
	stop func() error // ends Run and returns what it returned; may be called again
	logs *proxytest.LogBuffer
}

// startProxy runs a proxy before the etcd at address. edit may change the configuration; by default
// it listens on loopback.
func startProxy(t testing.TB, etcd string, rules []etcdapi.Rule, edit func(*Config)) *running {
	t.Helper()
	// what holds for relayed calls holds for handled ones
	return startRelaying(t, etcd, rules, edit, os.Getenv("PROXY_TEST_CALLS") != "handled")
}

// startRelaying is startProxy for a proxy that relays calls, or has all of them handled.
func startRelaying(t testing.TB, etcd string, rules []etcdapi.Rule, edit func(*Config), relays bool) *running {
	t.Helper()
	logs := &proxytest.LogBuffer{}
	cfg := Config{
		Listeners: []listener.Config{{Address: "127.0.0.1:0"}},
		Upstream:  upstream.Config{Endpoints: []string{"http://" + etcd}},
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
	for _, row := range etcdapi.MethodTable() {
		if m, err := p.api.Lookup(row.Path); err == nil {
			m.Relayed = m.Relayed && relays
		}
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
	return proxytest.Dial(t, r.Addrs()[0].String(), append([]grpc.DialOption{grpc.WithTransportCredentials(insecure.NewCredentials())}, opts...)...)
}
