// Package k3s follows docs/deploy/k3s-rke2.md with a real etcd and a real kube-apiserver. k3s
// itself is not built: its API server is kube-apiserver, with the flags that k3s derives from its
// own.
package k3s

import (
	"os"
	"strings"
	"testing"
	"time"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	core "k8s.io/api/core/v1"
	meta "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	within  = time.Minute
	address = "127.0.0.1:12379" // of the proxy, on the page
)

// block returns the first YAML block of the page that holds text, with the addresses and the files
// of this test.
func block(t *testing.T, text string, replace *strings.Replacer) []byte {
	t.Helper()
	page, err := os.ReadFile("../../docs/deploy/k3s-rke2.md")
	if err != nil {
		t.Fatal(err)
	}
	for i, part := range strings.Split(string(page), "```") {
		if body, ok := strings.CutPrefix(part, "yaml\n"); ok && i%2 == 1 && strings.Contains(body, text) {
			return []byte(replace.Replace(body))
		}
	}
	t.Fatalf("the page has no YAML block with %s", text)
	return nil
}

// datastore is the part of /etc/rancher/k3s/config.yaml that the page shows.
type datastore struct {
	Endpoint string   `json:"datastore-endpoint"`
	CAFile   string   `json:"datastore-cafile"`
	CertFile string   `json:"datastore-certfile"`
	KeyFile  string   `json:"datastore-keyfile"`
	Args     []string `json:"kube-apiserver-arg"`
}

// TestPage has the API server use the proxy in both ways that the page describes.
func TestPage(t *testing.T) {
	env := harness.New(t)
	ca := env.NewCA("etcd-ca")
	etcd := env.StartEtcd(harness.EtcdConfig{CA: ca})
	listen := harness.FreeAddress(t)
	server := ca.Server("proxy-server")
	replace := strings.NewReplacer(
		address, listen,
		"https://10.0.0.1:2379, https://10.0.0.2:2379, https://10.0.0.3:2379", etcd.URL,
		"/etc/etcd-kms-proxy/etcd-ca.crt", ca.File,
		"/etc/etcd-kms-proxy/server.crt", server.CertFile, "/etc/etcd-kms-proxy/server.key", server.KeyFile,
		"/etc/etcd-kms-proxy/client.crt", etcd.Client.CertFile, "/etc/etcd-kms-proxy/client.key", etcd.Client.KeyFile,
	)
	var config harness.ProxyConfig
	if err := yaml.UnmarshalStrict(block(t, "listeners:", replace), &config); err != nil {
		t.Fatal(err)
	}
	config.KMS, config.Rules = []harness.KMSConfig{env.LocalKey("main", 1)}, []harness.Rule{{Prefix: "/registry/secrets/", WriteWith: "main"}}
	proxy := env.StartProxy("proxy", config)
	proxy.WaitReady(within)

	t.Run("external etcd", func(t *testing.T) {
		var d datastore
		if err := yaml.UnmarshalStrict(block(t, "datastore-endpoint:", replace), &d); err != nil {
			t.Fatal(err)
		}
		api := env.StartAPIServer(harness.APIServerConfig{
			Name: "external", EtcdServers: d.Endpoint, CAFile: d.CAFile, Client: harness.Pair{CertFile: d.CertFile, KeyFile: d.KeyFile},
		})
		encrypted(t, env, api, etcd, "external")

		// The bootstrap data of k3s, as its client of etcd reads and writes it.
		direct, through := harness.Dial(t, etcd.Address, etcd.TLS), harness.Dial(t, listen, etcd.TLS)
		defer direct.Close()
		defer through.Close()
		key, value := []byte("/bootstrap/0123456789ab"), []byte(env.Clear.Value("bootstrap"))
		if _, err := etcdserverpb.NewKVClient(through).Put(t.Context(), &etcdserverpb.PutRequest{Key: key, Value: value}); err != nil {
			t.Fatal(err)
		}
		for _, conn := range []etcdserverpb.KVClient{etcdserverpb.NewKVClient(direct), etcdserverpb.NewKVClient(through)} {
			r, err := conn.Range(t.Context(), &etcdserverpb.RangeRequest{Key: []byte("/bootstrap"), RangeEnd: []byte("/bootstraq")})
			if err != nil || len(r.Kvs) != 1 || string(r.Kvs[0].Value) != string(value) {
				t.Errorf("the bootstrap data is not unchanged: %d values, %v", len(r.GetKvs()), err)
			}
		}
		api.Stop(within)
	})
	t.Run("embedded etcd", func(t *testing.T) {
		var d datastore
		if err := yaml.UnmarshalStrict(block(t, "etcd-servers-overrides", replace), &d); err != nil {
			t.Fatal(err)
		}
		cfg := harness.APIServerConfig{Name: "embedded", EtcdServers: etcd.URL, CAFile: ca.File, Client: etcd.Client}
		for _, a := range d.Args {
			cfg.Flags = append(cfg.Flags, "--"+a)
		}
		encrypted(t, env, env.StartAPIServer(cfg), etcd, "embedded")
	})
}

// encrypted creates a Secret, and checks that etcd holds ciphertext.
func encrypted(t *testing.T, env *harness.Env, api *harness.APIServer, etcd *harness.Etcd, name string) {
	t.Helper()
	secrets := api.Client.CoreV1().Secrets("default")
	value := env.Sealed.Value(name)
	if _, err := secrets.Create(t.Context(), &core.Secret{ObjectMeta: meta.ObjectMeta{Name: name}, StringData: map[string]string{"value": value}}, meta.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	s, err := secrets.Get(t.Context(), name, meta.GetOptions{})
	if err != nil || string(s.Data["value"]) != value {
		t.Errorf("the Secret is not as it was written: %v", err)
	}
	conn := harness.Dial(t, etcd.Address, etcd.TLS)
	defer conn.Close()
	r, err := etcdserverpb.NewKVClient(conn).Range(t.Context(), &etcdserverpb.RangeRequest{Key: []byte("/registry/secrets/default/" + name)})
	if err != nil || len(r.Kvs) != 1 || !strings.HasPrefix(string(r.Kvs[0].Value), "k8s:enc:kms:v2:main:") {
		t.Errorf("etcd does not hold ciphertext: %d values, %v", len(r.GetKvs()), err)
	}
}
