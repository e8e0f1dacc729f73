// Package kubernetes runs a real, unmodified kube-apiserver on a real etcd with the proxy between
// them.
package kubernetes

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	provider   = "acme"
	secrets    = "/registry/secrets/"
	widgets    = "/registry/stable.example.com/widgets/"
	ciphertext = "k8s:enc:kms:v2:" + provider + ":"
)

// shape is one way to connect the API server, the proxy and etcd.
type shape struct {
	name       string
	transport  string // tcp, unix, tls, unix+tls
	unstreamed bool   // turns the API server's RangeStream off
	onlySecret bool   // only Secrets go through the proxy
	plugin     bool   // keys from a KMS v2 plugin that the test controls; otherwise a local key
}

// stack is etcd, the proxy and, once started, an API server.
type stack struct {
	shape
	env   *harness.Env
	etcd  *harness.Etcd
	kms   *harness.KMS // only with plugin; it does not serve at first
	proxy *harness.Proxy
	api   *harness.APIServer

	apiConfig harness.APIServerConfig
	raw, via  pb.KVClient // etcd without and through the proxy
}

func newStack(t *testing.T, s shape) *stack {
	t.Helper()
	env := harness.New(t)
	k := &stack{shape: s, env: env}
	var etcdCA *harness.CA
	if strings.HasSuffix(s.transport, "tls") {
		etcdCA = env.NewCA("etcd")
	}
	k.etcd = env.StartEtcd(harness.EtcdConfig{CA: etcdCA})

	var kms harness.KMSConfig
	if s.plugin {
		k.kms = env.NewKMS(provider)
		kms = k.kms.Config(provider)
	} else {
		kms = env.LocalKey(provider, 2)
	}
	cfg := harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: []string{k.etcd.URL}},
		KMS:  []harness.KMSConfig{kms},
		Rules: []harness.Rule{
			{Prefix: secrets, WriteWith: provider},
			{Prefix: widgets, WriteWith: provider},
		},
	}
	if s.transport == "unix" {
		cfg.Listeners = []harness.Listener{env.UnixListener("etcd")}
	}
	var client harness.Pair
	switch s.transport {
	case "unix+tls":
		// The API server's TLS files are for etcd and for the socket at once: one CA for both, and
		// a certificate for the socket's file name.
		server := etcdCA.Server("socket", "etcd.sock")
		client = etcdCA.Client("apiserver", "kube-apiserver-etcd-client")
		listener := env.UnixListener("etcd")
		listener.TLS = &harness.ServerTLS{CertFile: server.CertFile, KeyFile: server.KeyFile, ClientCAFile: etcdCA.File}
		listener.AllowedClients = []string{"kube-apiserver-etcd-client"}
		cfg.Listeners = []harness.Listener{listener}
		cfg.Etcd.TLS = &harness.ClientTLS{CAFile: etcdCA.File, CertFile: k.etcd.Client.CertFile, KeyFile: k.etcd.Client.KeyFile}
		k.apiConfig.CAFile, k.apiConfig.Client = etcdCA.File, client
		k.proxy = env.StartProxy("proxy", cfg)
		own := etcdCA.ClientTLS(client)
		own.ServerName = "etcd.sock"
		k.via = pb.NewKVClient(harness.Dial(t, k.proxy.Address, own))
	case "tls":
		// Each connection has its own CA: no certificate of one is valid for the other.
		ca := env.NewCA("proxy")
		server := ca.Server("server")
		client = ca.Client("apiserver", "kube-apiserver-etcd-client")
		cfg.Listeners = []harness.Listener{{
			Address:        harness.FreeAddress(t),
			TLS:            &harness.ServerTLS{CertFile: server.CertFile, KeyFile: server.KeyFile, ClientCAFile: ca.File},
			AllowedClients: []string{"kube-apiserver-etcd-client"},
		}}
		cfg.Etcd.TLS = &harness.ClientTLS{CAFile: etcdCA.File, CertFile: k.etcd.Client.CertFile, KeyFile: k.etcd.Client.KeyFile}
		k.apiConfig.CAFile, k.apiConfig.Client = ca.File, client
		k.proxy = env.StartProxy("proxy", cfg)
		k.via = pb.NewKVClient(harness.Dial(t, k.proxy.Address, ca.ClientTLS(client)))
	default:
		k.proxy = env.StartProxy("proxy", cfg)
		k.via = pb.NewKVClient(harness.Dial(t, k.proxy.Address, nil))
	}
	k.raw = pb.NewKVClient(harness.Dial(t, k.etcd.Address, k.etcd.TLS))

	k.apiConfig.EtcdServers = k.proxy.URL()
	if s.onlySecret {
		k.apiConfig.EtcdServers, k.apiConfig.SecretsAt = k.etcd.URL, k.proxy.URL()
	}
	if s.unstreamed {
		k.apiConfig.Flags = append(k.apiConfig.Flags, "--feature-gates=EtcdRangeStream=false")
	}
	return k
}

// start starts the API server and waits until it is ready.
func (k *stack) start() {
	k.env.TB.Helper()
	k.api = k.env.StartAPIServer(k.apiConfig)
}

// stored reads everything in etcd, as it is stored.
func (k *stack) stored(t *testing.T) map[string]*kv {
	t.Helper()
	return everything(t, k.raw)
}

type kv struct {
	value       []byte
	modRevision int64
}

func everything(t *testing.T, client pb.KVClient) map[string]*kv {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	response, err := client.Range(ctx, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
	if err != nil {
		t.Fatalf("read everything: %v", err)
	}
	all := map[string]*kv{}
	for _, one := range response.Kvs {
		all[string(one.Key)] = &kv{one.Value, one.ModRevision}
	}
	return all
}

// checkStored checks that values under a rule are ciphertext in etcd and objects through the proxy,
// and that nothing else is changed.
func (k *stack) checkStored(t *testing.T) {
	t.Helper()
	var stored, seen map[string]*kv
	// The API server renews its own leases from time to time: repeat until nothing has changed
	// between the two reads.
	harness.Eventually(t, 60*time.Second, "a quiet moment", func() error {
		stored, seen = k.stored(t), everything(t, k.via)
		if len(stored) != len(seen) {
			return fmt.Errorf("%d keys in etcd, %d through the proxy", len(stored), len(seen))
		}
		for key, have := range stored {
			if other := seen[key]; other == nil || other.modRevision != have.modRevision {
				return fmt.Errorf("key %s has changed", key)
			}
		}
		return nil
	})
	sealed := 0
	for key, have := range stored {
		object := seen[key].value
		if strings.HasPrefix(key, secrets) || strings.HasPrefix(key, widgets) && !k.onlySecret {
			sealed++
			if !bytes.HasPrefix(have.value, []byte(ciphertext)) {
				t.Errorf("etcd holds no ciphertext for %s", key)
			}
			if !bytes.HasPrefix(object, []byte("k8s\x00")) && !bytes.HasPrefix(object, []byte("{")) {
				t.Errorf("through the proxy %s is no object", key)
			}
			continue
		}
		if bytes.Contains(have.value, []byte("k8s:enc:")) || !bytes.Equal(have.value, object) {
			t.Errorf("the value of %s, under no rule, was touched", key)
		}
	}
	if sealed == 0 || len(stored) < sealed+50 {
		t.Errorf("%d of %d keys are sealed: this proves nothing", sealed, len(stored))
	}
}

// calls returns how many calls of a gRPC method etcd has counted.
func (k *stack) calls(t *testing.T, method string) int {
	t.Helper()
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{TLSClientConfig: k.etcd.TLS}}
	response, err := client.Get(k.etcd.URL + "/metrics")
	if err != nil {
		t.Fatalf("read etcd's metrics: %v", err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatalf("read etcd's metrics: %v", err)
	}
	for line := range strings.Lines(string(body)) {
		if strings.HasPrefix(line, "grpc_server_started_total{") && strings.Contains(line, fmt.Sprintf("grpc_method=%q", method)) {
			fields := strings.Fields(line)
			count, err := strconv.ParseFloat(fields[len(fields)-1], 64)
			if err != nil {
				t.Fatalf("read etcd's metrics: %v", err)
			}
			return int(count)
		}
	}
	return 0
}
