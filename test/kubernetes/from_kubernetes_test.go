package kubernetes

import (
	"encoding/base64"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	networkingv1 "k8s.io/api/networking/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// everyProvider is an encryption configuration in which each provider of the API server writes
// something, with wildcards, exceptions and, except for two lists, no plaintext.
const everyProvider = `apiVersion: apiserver.config.k8s.io/v1
kind: EncryptionConfiguration
resources:
- resources: [events]
  providers: [{identity: {}}]
- resources: [secrets, widgets.stable.example.com]
  providers:
  - aescbc: {keys: [{name: key1, secret: KEY1}]}
  - identity: {}
- resources: [replicationcontrollers, nodes, ingresses.networking.k8s.io]
  providers: [{secretbox: {keys: [{name: key1, secret: KEY2}]}}]
- resources: ['*.']
  providers: [{aesgcm: {keys: [{name: 'key:1', secret: KEY3}]}}]
- resources: ['*.apps']
  providers:
  - kms: {apiVersion: v2, name: acme, endpoint: SOCKET}
- resources: ['*.*']
  providers: [{secretbox: {keys: [{name: key2, secret: KEY4}, {name: key1, secret: KEY2}]}}]
`

// storedBy says how the API server must have stored keys, so that the test sees whether the
// converted rules distinguish them.
var storedBy = map[string]string{
	"/registry/secrets/default/":                                "k8s:enc:aescbc:v1:key1:",
	"/registry/stable.example.com/widgets/default/":             "k8s:enc:aescbc:v1:key1:",
	"/registry/controllers/default/":                            "k8s:enc:secretbox:v1:key1:",
	"/registry/minions/":                                        "k8s:enc:secretbox:v1:key1:",
	"/registry/ingress/default/":                                "k8s:enc:secretbox:v1:key1:",
	"/registry/configmaps/default/":                             "k8s:enc:aesgcm:v1:key:1:",
	"/registry/services/specs/default/":                         "k8s:enc:aesgcm:v1:key:1:",
	"/registry/services/endpoints/default/":                     "k8s:enc:aesgcm:v1:key:1:",
	"/registry/namespaces/":                                     "k8s:enc:aesgcm:v1:key:1:",
	"/registry/deployments/default/":                            "k8s:enc:kms:v2:acme:",
	"/registry/apiextensions.k8s.io/customresourcedefinitions/": "k8s:enc:secretbox:v1:key2:",
	"/registry/apiregistration.k8s.io/apiservices/":             "k8s:enc:secretbox:v1:key2:",
	"/registry/clusterroles/":                                   "k8s:enc:secretbox:v1:key2:",
	"/registry/leases/":                                         "k8s:enc:secretbox:v1:key2:",
	"/registry/events/default/":                                 "k8s\x00",
	"/registry/ranges/":                                         "k8s\x00",
	"/registry/peerserverleases/":                               "k8s\x00",
	"/registry/masterleases/":                                   "k8s\x00",
}

// TestFromKubernetes moves a cluster from the API server's own encryption with every kind of
// provider to the proxy. It converts the configuration, reads the stored values through strict
// rules, continues with an API server without encryption, and checks that nothing needs the old
// keys after reencrypt.
func TestFromKubernetes(t *testing.T) {
	t.Parallel()
	env := harness.New(t)
	k := &stack{env: env, etcd: env.StartEtcd(harness.EtcdConfig{}), kms: env.NewKMS(provider)}
	k.kms.Start()
	k.raw = pb.NewKVClient(harness.Dial(t, k.etcd.Address, k.etcd.TLS))

	text := strings.ReplaceAll(everyProvider, "SOCKET", k.kms.Socket)
	for i, size := range []int{32, 32, 16, 32} {
		text = strings.ReplaceAll(text, fmt.Sprintf("KEY%d", i+1), base64.StdEncoding.EncodeToString(env.Sealed.Key(100 + i)[:size]))
	}
	file := env.File("encryption.yaml", []byte(text))
	k.api = env.StartAPIServer(harness.APIServerConfig{Name: "apiserver-own", EtcdServers: k.etcd.URL, EncryptionConfig: file})
	k.oneOfEach(t)
	var before map[string]*kv
	harness.Eventually(t, 60*time.Second, "the API server to store one of each", func() error {
		before = k.stored(t)
		for prefix := range storedBy {
			if !slices.ContainsFunc(keysOf(before), func(key string) bool { return strings.HasPrefix(key, prefix) }) {
				return fmt.Errorf("nothing below %s", prefix)
			}
		}
		return nil
	})
	k.api.Kill()
	before = k.stored(t)
	for prefix, marker := range storedBy {
		for key, have := range before {
			if strings.HasPrefix(key, prefix) && !strings.HasPrefix(string(have.value), marker) {
				t.Errorf("%s is not stored by %q", key, marker)
			}
		}
	}

	k.convert(t, file)
	k.via = pb.NewKVClient(harness.Dial(t, k.proxy.Address, nil))
	seen := everything(t, k.via) // fails if one value cannot be decrypted or read
	for key, have := range before {
		switch now := seen[key]; {
		case now == nil || strings.Contains(string(now.value), "k8s:enc:"):
			t.Errorf("%s was not opened", key)
		case !strings.HasPrefix(string(have.value), "k8s:enc:") && string(now.value) != string(have.value):
			t.Errorf("%s was plaintext, and was changed", key)
		}
	}

	k.apiConfig = harness.APIServerConfig{Name: "apiserver-through", EtcdServers: k.proxy.URL()}
	k.start()
	got, err := k.client("default").Get(t.Context(), "one", metav1.GetOptions{})
	k.wants(t, got, err, "one")
	updated, err := k.client("default").Update(t.Context(), k.secret("one", "two"), metav1.UpdateOptions{})
	k.wants(t, updated, err, "two")
	if now := k.stored(t)["/registry/secrets/default/one"]; !strings.HasPrefix(string(now.value), ciphertext) {
		t.Errorf("a new value is stored as %.30q", now.value)
	}

	if out, code := env.Run("status", "--config", k.proxy.ConfigFile); code != 1 {
		t.Errorf("status before: exit code %d\n%s", code, out)
	}
	if out, code := env.Run("reencrypt", "--config", k.proxy.ConfigFile); code != 0 {
		t.Fatalf("reencrypt: exit code %d\n%s", code, out)
	}
	if out, code := env.Run("status", "--config", k.proxy.ConfigFile); code != 0 {
		t.Errorf("status after: exit code %d\n%s", code, out)
	}
	for key, have := range k.stored(t) {
		for _, kind := range []string{"aescbc", "aesgcm", "secretbox"} {
			if strings.HasPrefix(string(have.value), "k8s:enc:"+kind) {
				t.Errorf("%s is still sealed with %s", key, kind)
			}
		}
	}
	got, err = k.client("default").Get(t.Context(), "one", metav1.GetOptions{})
	k.wants(t, got, err, "two")
	widget, err := k.defineWidgets(t).Get(t.Context(), "one", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if token, _, _ := unstructured.NestedString(widget.Object, "spec", "token"); token != env.Sealed.Value("one") {
		t.Errorf("the widget holds %q", token)
	}
}

// convert runs the conversion command, replaces its placeholders with the stack's addresses, and
// starts the proxy with the result.
func (k *stack) convert(t *testing.T, file string) {
	t.Helper()
	keys, made := filepath.Join(k.env.Dir, "keys"), filepath.Join(k.env.Dir, "made.yaml")
	if err := os.Mkdir(keys, 0o700); err != nil {
		t.Fatal(err)
	}
	out, code := k.env.Run("config", "from-kubernetes", file, "--key-dir", keys, "--write-with", provider, "--output", made)
	if code != 0 && (code != 1 || !strings.Contains(out, "is a placeholder")) { // filled in below
		t.Fatalf("config from-kubernetes: exit code %d\n%s", code, out)
	}
	if out, code := k.env.Run("config", "check", "--config", made); code != 0 {
		t.Errorf("config check: exit code %d\n%s", code, out)
	}
	text, err := os.ReadFile(made)
	if err != nil {
		t.Fatal(err)
	}
	k.proxy = k.env.NewProxy("proxy", harness.ProxyConfig{Etcd: harness.Upstream{Endpoints: []string{k.etcd.URL}}})
	changed := string(text) + "log: {level: debug}\n"
	for old, now := range map[string]string{
		"address: unix:///run/etcd-kms-proxy/etcd.sock": "address: " + k.proxy.Address,
		"http://127.0.0.1:2379":                         k.etcd.URL,
		"127.0.0.1:9379":                                k.proxy.Config.Admin.Address,
	} {
		if strings.Count(changed, old) != 1 {
			t.Fatalf("%q stands %d times in\n%s", old, strings.Count(changed, old), changed)
		}
		changed = strings.ReplaceAll(changed, old, now)
	}
	k.env.File(filepath.Base(k.proxy.ConfigFile), []byte(changed))
	k.proxy.Start()
	k.proxy.WaitReady(30 * time.Second)
}

// oneOfEach creates an object for each kind of place in etcd.
func (k *stack) oneOfEach(t *testing.T) {
	t.Helper()
	ctx, client := t.Context(), k.api.Client
	create := func(what string, err error) {
		t.Helper()
		if err != nil {
			t.Fatalf("create %s: %v", what, err)
		}
	}
	meta := metav1.ObjectMeta{Name: "one"}
	_, err := k.client("default").Create(ctx, k.secret("one", "one"), metav1.CreateOptions{})
	create("Secret", err)
	_, err = k.defineWidgets(t).Create(ctx, k.widget("one", "one"), metav1.CreateOptions{})
	create("widget", err)
	_, err = client.CoreV1().ConfigMaps("default").Create(ctx, &corev1.ConfigMap{ObjectMeta: meta, Data: map[string]string{"a": "b"}}, metav1.CreateOptions{})
	create("ConfigMap", err)
	_, err = client.CoreV1().Nodes().Create(ctx, &corev1.Node{ObjectMeta: meta}, metav1.CreateOptions{})
	create("Node", err)
	labels := map[string]string{"app": "one"}
	pod := corev1.PodTemplateSpec{ObjectMeta: metav1.ObjectMeta{Labels: labels}, Spec: corev1.PodSpec{Containers: []corev1.Container{{Name: "c", Image: "i"}}}}
	_, err = client.CoreV1().ReplicationControllers("default").Create(ctx, &corev1.ReplicationController{ObjectMeta: meta, Spec: corev1.ReplicationControllerSpec{Selector: labels, Template: &pod}}, metav1.CreateOptions{})
	create("ReplicationController", err)
	_, err = client.AppsV1().Deployments("default").Create(ctx, &appsv1.Deployment{ObjectMeta: meta, Spec: appsv1.DeploymentSpec{Selector: &metav1.LabelSelector{MatchLabels: labels}, Template: pod}}, metav1.CreateOptions{})
	create("Deployment", err)
	backend := &networkingv1.IngressBackend{Service: &networkingv1.IngressServiceBackend{Name: "one", Port: networkingv1.ServiceBackendPort{Number: 80}}}
	_, err = client.NetworkingV1().Ingresses("default").Create(ctx, &networkingv1.Ingress{ObjectMeta: meta, Spec: networkingv1.IngressSpec{DefaultBackend: backend}}, metav1.CreateOptions{})
	create("Ingress", err)
	event := &corev1.Event{ObjectMeta: metav1.ObjectMeta{Name: "one", Namespace: "default"}, InvolvedObject: corev1.ObjectReference{Kind: "Node", Name: "one", Namespace: "default"}, Reason: "Test"}
	_, err = client.CoreV1().Events("default").Create(ctx, event, metav1.CreateOptions{})
	create("Event", err)
}

func keysOf(m map[string]*kv) []string {
	keys := make([]string, 0, len(m))
	for key := range m {
		keys = append(keys, key)
	}
	return keys
}
