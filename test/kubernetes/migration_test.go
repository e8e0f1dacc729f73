package kubernetes

import (
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const encryptionConfiguration = `apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [secrets, widgets.stable.example.com]
  providers:
  - kms: {apiVersion: v2, name: %s, endpoint: %q, timeout: 3s}
  - identity: {}
`

// TestMigration moves a cluster in and out without rewriting an object: the API server's own KMS v2
// provider writes, the proxy reads and writes, and the API server's provider reads again. All use
// one plugin.
func TestMigration(t *testing.T) {
	t.Parallel()
	k := newStack(t, shape{transport: "tcp", plugin: true})
	k.kms.Start()
	k.proxy.WaitReady(60 * time.Second)

	own := harness.APIServerConfig{
		Name: "apiserver-own", EtcdServers: k.etcd.URL,
		EncryptionConfig: k.env.File("encryption.yaml", fmt.Appendf(nil, encryptionConfiguration, provider, k.kms.Socket)),
	}
	k.api = k.env.StartAPIServer(own)
	want := map[string]string{}
	create := func(prefix string, n int) {
		t.Helper()
		resource := k.defineWidgets(t)
		for i := range n {
			name := fmt.Sprintf("%s-%d", prefix, i)
			created, err := k.client("default").Create(t.Context(), k.secret(name, name), metav1.CreateOptions{})
			k.wants(t, created, err, name)
			if _, err := resource.Create(t.Context(), k.widget(name, name), metav1.CreateOptions{}); err != nil {
				t.Fatal(err)
			}
			want[name] = name
		}
	}
	update := func(name, value string) {
		t.Helper()
		updated, err := k.client("default").Update(t.Context(), k.secret(name, value), metav1.UpdateOptions{})
		k.wants(t, updated, err, value)
		want[name] = value
	}
	check := func(when string) {
		t.Helper()
		list, err := k.client("default").List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatalf("%s: %v", when, err)
		}
		seen := map[string]*corev1.Secret{}
		for i := range list.Items {
			seen[list.Items[i].Name] = &list.Items[i]
		}
		resource := k.defineWidgets(t)
		for name, value := range want {
			if seen[name] == nil {
				t.Fatalf("%s: Secret %s is not listed", when, name)
			}
			k.wants(t, seen[name], nil, value)
			got, err := k.client("default").Get(t.Context(), name, metav1.GetOptions{})
			k.wants(t, got, err, value)
			widget, err := resource.Get(t.Context(), name, metav1.GetOptions{})
			if err != nil {
				t.Fatalf("%s: %v", when, err)
			}
			if token, _, _ := unstructured.NestedString(widget.Object, "spec", "token"); token != k.env.Sealed.Value(name) {
				t.Errorf("%s: widget %s holds %q", when, name, token)
			}
		}
		for key, have := range k.stored(t) {
			if (strings.HasPrefix(key, secrets) || strings.HasPrefix(key, widgets)) && !strings.HasPrefix(string(have.value), ciphertext) {
				t.Errorf("%s: etcd holds no ciphertext for %s", when, key)
			}
		}
	}
	create("own", 8)
	check("with the API server's own provider")
	before := k.stored(t)
	k.api.Kill()

	// In: the API server does not encrypt, and the proxy does. Existing values are readable at
	// once, also under the previous key version.
	k.kms.Rotate()
	through := k.apiConfig
	through.Name = "apiserver-through"
	k.api = k.env.StartAPIServer(through)
	check("through the proxy")
	for name := range want {
		if key := secrets + "default/" + name; k.stored(t)[key].modRevision != before[key].modRevision {
			t.Errorf("%s was rewritten by being read", key)
		}
	}
	create("through", 8)
	update("own-0", "changed through the proxy")
	check("through the proxy, with new objects")
	k.checkStored(t)
	k.api.Kill()

	// Out.
	own.Name = "apiserver-again"
	k.api = k.env.StartAPIServer(own)
	check("with the API server's own provider again")
	update("through-0", "changed by the API server")
	create("again", 2)
	check("with the API server's own provider, with new objects")
	k.api.Kill()

	through.Name = "apiserver-through-again"
	k.api = k.env.StartAPIServer(through)
	check("through the proxy again")
}
