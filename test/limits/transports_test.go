package limits

import (
	"crypto/tls"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// transport is one way to reach a bare etcd, and the proxies that must behave like it.
type transport struct {
	name    string
	tls     *tls.Config // nil without TLS
	etcd    string      // an address
	proxies map[string]string
}

// transports starts a bare etcd and the proxy, without TLS and with it.
// Values below /ruled/ are encrypted. No client needs a certificate.
func transports(t *testing.T) []transport {
	t.Helper()
	env := harness.New(t)
	ca := env.NewCA("servers")
	pair := ca.Server("proxy")
	config := ca.ClientTLS(ca.Client("client", ""))
	config.NextProtos = []string{"h2"}
	bare := env.StartEtcd(harness.EtcdConfig{Name: "bare", Bare: true})
	secure := env.StartEtcd(harness.EtcdConfig{Name: "secure", Bare: true, CA: ca, Flags: []string{"--trusted-ca-file", "", "--client-cert-auth=false"}})
	behind := env.StartEtcd(harness.EtcdConfig{Name: "behind"})
	key := env.LocalKey("local", 1)
	cfg := harness.ProxyConfig{
		Listeners: []harness.Listener{
			{Address: harness.FreeAddress(t)},
			{Address: harness.FreeAddress(t), TLS: &harness.ServerTLS{CertFile: pair.CertFile, KeyFile: pair.KeyFile}},
		},
		Coordination: harness.NoCoordination(),
		Etcd:         harness.Upstream{Endpoints: []string{behind.URL}},
		KMS:          []harness.KMSConfig{key},
		Rules:        []harness.Rule{{Prefix: "/ruled/", WriteWith: "local"}},
		Log:          harness.LogConfig{Level: "info"},
	}
	p := env.NewProxy("proxy", cfg)
	p.Start()
	p.WaitReady(30 * time.Second)
	return []transport{
		{name: "without TLS", etcd: bare.Address, proxies: map[string]string{"the proxy": cfg.Listeners[0].Address}},
		{name: "with TLS", tls: config, etcd: secure.Address, proxies: map[string]string{"the proxy": cfg.Listeners[1].Address}},
	}
}

// sides are all servers of a transport.
func (w transport) sides() map[string]string {
	all := map[string]string{"bare etcd": w.etcd}
	for name, address := range w.proxies {
		all[name] = address
	}
	return all
}

// greet opens a connection, and sends the preface and empty settings.
func (w transport) greet(t *testing.T, address string) *frameClient {
	t.Helper()
	if w.tls == nil {
		return greet(t, address)
	}
	conn, err := tls.Dial("tcp", address, w.tls)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	k := newFrameClient(conn)
	k.raw(http2.ClientPreface)
	_ = k.WriteSettings()
	return k
}
