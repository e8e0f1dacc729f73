package kubernetes

import (
	"bytes"
	"fmt"
	"os"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// secretsByPlugin has an API server seal Secrets by a plugin.
const secretsByPlugin = `apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets]
  providers:
  - kms: {apiVersion: v2, name: %s, endpoint: %q, timeout: 3s}
  - identity: {}
`

// keyIDOf reads the key ID out of a stored value.
func keyIDOf(t *testing.T, stored []byte) string {
	t.Helper()
	_, object, ok := envelope.Split(stored)
	if !ok {
		t.Fatal("not sealed")
	}
	o, err := envelope.Parse(object)
	if err != nil {
		t.Fatal(err)
	}
	return o.KeyID
}

// writeKeys writes the first n of the environment's keys as a local key file, in the old one's place.
func writeKeys(t *testing.T, env *harness.Env, path string, n int) {
	t.Helper()
	made := env.LocalKey("next", n)
	if err := os.Rename(made.Local.KeyFile, path); err != nil {
		t.Fatal(err)
	}
}

// TestServePlugin: one binary serves both ways of encrypting a cluster. An API server with its own KMS v2 provider, whose plugin is `kms
// serve-plugin` on a key file, and the proxy with that key file under the provider's name, at the same time and on the same etcd, read what
// the other writes; through a rotation of the key under the running API server, and a crash of the plugin.
func TestServePlugin(t *testing.T) {
	t.Parallel()
	k := &stack{env: harness.New(t)}
	k.etcd = k.env.StartEtcd(harness.EtcdConfig{})
	kms := k.env.LocalKey(provider, 1)
	kms.PollInterval = "1s"
	key := kms.Local.KeyFile
	k.proxy = k.env.StartProxy("proxy", harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: []string{k.etcd.URL}}, KMS: []harness.KMSConfig{kms}, Rules: []harness.Rule{{Prefix: secrets, WriteWith: provider}},
	})
	k.raw, k.via = pb.NewKVClient(harness.Dial(t, k.etcd.Address, k.etcd.TLS)), pb.NewKVClient(harness.Dial(t, k.proxy.Address, nil))
	plugin := k.env.StartPlugin("plugin", provider, kms)

	through := k.env.NewAPIServer(harness.APIServerConfig{Name: "apiserver-through", EtcdServers: k.proxy.URL()})
	own := k.env.NewAPIServer(harness.APIServerConfig{
		Name: "apiserver-own", EtcdServers: k.etcd.URL,
		EncryptionConfig: k.env.File("encryption.yaml", fmt.Appendf(nil, secretsByPlugin, provider, plugin.Socket)),
	})
	own.Start()
	own.WaitReady(90 * time.Second)
	through.Start()
	through.WaitReady(90 * time.Second)
	sides := map[string]*harness.APIServer{"own": own, "through": through}

	want := map[string]string{}
	create := func(side, name string) {
		t.Helper()
		k.api = sides[side]
		created, err := k.client("default").Create(t.Context(), k.secret(name, name), metav1.CreateOptions{})
		k.wants(t, created, err, name)
		want[name] = name
	}
	// check reads everything by both ways, and looks whether etcd holds ciphertext.
	check := func(when string) {
		t.Helper()
		for side, api := range sides {
			k.api = api
			list, err := k.client("default").List(t.Context(), metav1.ListOptions{})
			if err != nil {
				t.Fatalf("%s, %s: %v", when, side, err)
			}
			if len(list.Items) != len(want) {
				t.Errorf("%s, %s: %d Secrets, want %d", when, side, len(list.Items), len(want))
			}
			for _, item := range list.Items {
				k.wants(t, &item, nil, want[item.Name])
			}
			for name := range want {
				got, err := k.client("default").Get(t.Context(), name, metav1.GetOptions{})
				k.wants(t, got, err, want[name])
			}
		}
		for key, have := range k.stored(t) {
			if strings.HasPrefix(key, secrets) && !bytes.HasPrefix(have.value, []byte(ciphertext)) {
				t.Errorf("%s: etcd holds no ciphertext for %s", when, key)
			}
		}
	}
	for i := range 4 {
		create("own", fmt.Sprintf("own-%d", i))
		create("through", fmt.Sprintf("through-%d", i))
	}
	check("at first")

	// The same bytes, read by etcd's own client through the proxy, are the object.
	for key, have := range everything(t, k.via) {
		if strings.HasPrefix(key, secrets+"default/") && !bytes.HasPrefix(have.value, []byte("k8s\x00")) {
			t.Errorf("through the proxy %s is no object", key)
		}
	}

	// A new version of the key, while all run. Whoever notices first, the other has the file too.
	writeKeys(t, k.env, key, 2)
	for n, side := range []string{"own", "through"} {
		harness.Eventually(t, 3*time.Minute, side+" to seal under the new key version", func() error {
			_ = own.Ready() // has the API server ask the plugin ahead of its minute
			name := fmt.Sprintf("rotated-%s-%d", side, time.Now().UnixNano())
			create(side, name)
			if id := keyIDOf(t, k.stored(t)[secrets+"default/"+name].value); id != "2" {
				time.Sleep(time.Second)
				return fmt.Errorf("it seals under %q", id)
			}
			return nil
		})
		check(fmt.Sprintf("rotated (%d)", n))
	}
	if log := plugin.Log(); !strings.Contains(log, `"from":"1","to":"2"`) {
		t.Error("the plugin's log says nothing of the rotation")
	}

	// A crash leaves the socket; the next plugin takes its place, and the API server finds it by itself.
	plugin.Kill()
	create("own", "without-plugin") // under the seed that it has
	check("without the plugin")     // by the seeds that it has
	plugin.Start()
	harness.Eventually(t, time.Minute, "the API server to be content with its plugin", own.Ready)
	create("own", "after-crash")
	check("after the crash")

	// One that starts now has every seed unwrapped by the plugin, those that the proxy wrote too.
	own.Kill()
	own.Start()
	own.WaitReady(90 * time.Second)
	check("after a restart of the API server")
	if !plugin.Stop(20 * time.Second) {
		t.Error("the plugin does not end")
	}
	if code := plugin.Wait(time.Second); code != 0 {
		t.Errorf("the plugin's exit code is %d", code)
	}
	if _, err := os.Lstat(strings.TrimPrefix(plugin.Socket, "unix://")); !os.IsNotExist(err) {
		t.Errorf("the plugin leaves its socket: %v", err)
	}
}
