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

// secretsByPlugin configures an API server to encrypt Secrets with a plugin.
const secretsByPlugin = `apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets]
  providers:
  - kms: {apiVersion: v2, name: %s, endpoint: %q, timeout: 3s}
  - identity: {}
`

// keyIDOf returns the key ID in a stored value.
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

// writeKeys writes the first n of the environment's keys as a local key file, in place of the old
// one.
func writeKeys(t *testing.T, env *harness.Env, path string, n int) {
	t.Helper()
	made := env.LocalKey("next", n)
	if err := os.Rename(made.Local.KeyFile, path); err != nil {
		t.Fatal(err)
	}
}

// TestServePlugin uses one key file for both ways to encrypt a cluster, at the same time and on the
// same etcd: an API server with its own KMS v2 provider, whose plugin is `kms serve-plugin`, and
// the proxy with that key file under the provider's name. Each reads what the other writes, through
// a rotation of the key under the running API server and a crash of the plugin.
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
	// check reads everything in both ways, and checks that etcd stores ciphertext.
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

	// etcd's own client reads the same bytes through the proxy as the object.
	for key, have := range everything(t, k.via) {
		if strings.HasPrefix(key, secrets+"default/") && !bytes.HasPrefix(have.value, []byte("k8s\x00")) {
			t.Errorf("through the proxy %s is no object", key)
		}
	}

	// Add a key version while all are running. The order in which they notice does not matter,
	// because all have the file.
	writeKeys(t, k.env, key, 2)
	for n, side := range []string{"own", "through"} {
		harness.Eventually(t, 3*time.Minute, side+" to seal under the new key version", func() error {
			_ = own.Ready() // makes the API server call the plugin before its minute is over
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

	// A crash leaves the socket file. The next plugin replaces it, and the API server connects to
	// it again.
	plugin.Kill()
	create("own", "without-plugin") // with the DEK seed that it has
	check("without the plugin")     // with the DEK seeds that it has
	plugin.Start()
	harness.Eventually(t, time.Minute, "the API server to be content with its plugin", own.Ready)
	create("own", "after-crash")
	check("after the crash")

	// An API server that starts now has the plugin unwrap every DEK seed, including the proxy's.
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
