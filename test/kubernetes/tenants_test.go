package kubernetes

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestTenants gives one namespace its own key. What happens to that key must not affect others. A
// list across both is an error while the fault may be temporary, and follows onUndecryptable when
// it is permanent.
func TestTenants(t *testing.T) {
	t.Parallel()
	const tenant = "tenant-a"
	env := harness.New(t)
	k := &stack{env: env, etcd: env.StartEtcd(harness.EtcdConfig{})}
	k.kms = env.NewKMS(tenant)
	k.kms.Start()
	k.proxy = env.StartProxy("proxy", harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: []string{k.etcd.URL}},
		KMS:  []harness.KMSConfig{env.LocalKey(provider, 1), k.kms.Config(tenant)},
		Rules: []harness.Rule{
			{Prefix: secrets, WriteWith: provider},
			{Prefix: secrets + tenant + "/", WriteWith: tenant, OnUndecryptable: "passthrough"},
		},
		Cache: &harness.Cache{RevokeWithin: "2s"},
	})
	k.proxy.WaitReady(30 * time.Second)
	k.raw, k.via = pb.NewKVClient(harness.Dial(t, k.etcd.Address, nil)), pb.NewKVClient(harness.Dial(t, k.proxy.Address, nil))
	k.apiConfig.EtcdServers = k.proxy.URL()
	k.start()
	var older *harness.APIServer // like those before 1.37 by default
	if !testing.Short() {
		older = env.StartAPIServer(harness.APIServerConfig{
			Name: "older", EtcdServers: k.proxy.URL(), Flags: []string{"--feature-gates=AllowUnsafeMalformedObjectDeletion=false"},
		})
	}
	ctx := t.Context()
	k.namespace(t, tenant)
	create := func(namespace, name string) {
		t.Helper()
		got, err := k.client(namespace).Create(ctx, k.secret(name, name), metav1.CreateOptions{})
		k.wants(t, got, err, name)
	}
	create("default", "ours")
	create(tenant, "theirs")
	create(tenant, "theirs-too")
	create(tenant, "theirs-three")
	for key, marker := range map[string]string{secrets + "default/ours": "k8s:enc:kms:v2:acme:", secrets + tenant + "/theirs": "k8s:enc:kms:v2:" + tenant + ":"} {
		if !bytes.HasPrefix(k.stored(t)[key].value, []byte(marker)) {
			t.Errorf("%s is not sealed under %s", key, marker)
		}
	}
	// The API server may answer a list from its cache; only etcd's own list includes both keys.
	across := func() (*pb.RangeResponse, error) {
		return k.via.Range(ctx, &pb.RangeRequest{Key: []byte(secrets), RangeEnd: []byte("/registry/secrets0")})
	}
	list := func(namespace string) ([]corev1.Secret, error) {
		l, err := k.client(namespace).List(ctx, metav1.ListOptions{Limit: 500})
		if err != nil {
			return nil, err
		}
		return l.Items, nil
	}
	othersWork := func(t *testing.T) {
		t.Helper()
		got, err := k.client("default").Get(ctx, "ours", metav1.GetOptions{})
		k.wants(t, got, err, "ours")
		if items, err := list("default"); err != nil || len(items) == 0 {
			t.Errorf("list of another namespace: %d, %v", len(items), err)
		}
		k.putConfigMap(t, "beside-"+strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(t.Name())))
	}
	refused := func(t *testing.T, words ...string) {
		t.Helper()
		harness.Eventually(t, 30*time.Second, "the tenant's Secrets to be refused", func() error {
			_, err := k.client(tenant).Get(ctx, "theirs", metav1.GetOptions{})
			for _, word := range append(words, "etcd-kms-proxy: ", tenant) {
				if err == nil || !strings.Contains(err.Error(), word) {
					return errWant{word, err}
				}
			}
			return nil
		})
		if _, err := across(); err == nil {
			t.Error("a list across both keys leaves out what may come back")
		}
	}
	works := func(t *testing.T) {
		t.Helper()
		harness.Eventually(t, 60*time.Second, "the tenant's Secrets to be read", func() error {
			got, err := k.client(tenant).Get(ctx, "theirs", metav1.GetOptions{})
			if err == nil {
				k.wants(t, got, nil, "theirs")
			}
			return err
		})
		if _, err := across(); err != nil {
			t.Errorf("list across both keys: %v", err)
		}
	}

	t.Run("a disabled key", func(t *testing.T) {
		k.kms.Disable(true)
		refused(t)
		othersWork(t)
		k.kms.Disable(false)
		works(t)
	})
	t.Run("a silent KMS at the start", func(t *testing.T) {
		k.kms.Stop()
		k.proxy.Kill()
		k.proxy.Start()
		harness.Eventually(t, 60*time.Second, "the API server to be ready again", k.api.Ready)
		refused(t, "Unavailable")
		othersWork(t)
		k.kms.Start()
		works(t)
	})
	t.Run("a damaged value", func(t *testing.T) {
		damaged := map[string][]byte{}
		stored := k.stored(t)
		for _, name := range []string{"theirs-three", "theirs-too"} {
			key := secrets + tenant + "/" + name
			damaged[key] = bytes.Clone(stored[key].value)
			damaged[key][len(damaged[key])-1] ^= 1
			if _, err := k.raw.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: damaged[key]}); err != nil {
				t.Fatal(err)
			}
		}
		othersWork(t)
		got, err := k.client(tenant).Get(ctx, "theirs", metav1.GetOptions{})
		k.wants(t, got, err, "theirs")
		res, err := across()
		if err != nil {
			t.Fatalf("a plain client's list: %v", err)
		}
		for _, kv := range res.Kvs {
			if broken := damaged[string(kv.Key)]; (broken != nil) != bytes.Equal(kv.Value, broken) || (broken != nil) == bytes.HasPrefix(kv.Value, []byte("k8s\x00")) {
				t.Errorf("%s is handed on as the wrong thing", kv.Key)
			}
		}

		// The rule returns the values as stored. The API server finds that they are no objects, and
		// refuses the list with an error that names all of them.
		_, err = list(tenant)
		refusal, ok := errors.AsType[*apierrors.StatusError](err)
		if !ok || refusal.ErrStatus.Reason != metav1.StatusReasonStoreReadError || !strings.Contains(err.Error(), secrets+tenant+"/theirs-three") || !strings.Contains(err.Error(), "(and 1 more)") {
			t.Fatalf("list with damaged Secrets: %v", err)
		}
		var named []string
		for _, c := range refusal.ErrStatus.Details.Causes {
			named = append(named, c.Field)
		}
		if want := slices.Sorted(maps.Keys(damaged)); !slices.Equal(named, want) {
			t.Errorf("the list names %q as damaged, want %q", named, want)
		}
		if older != nil {
			_, err := older.Client.CoreV1().Secrets(tenant).List(ctx, metav1.ListOptions{Limit: 500})
			if err == nil || !strings.Contains(err.Error(), secrets+tenant+"/theirs-three") || strings.Contains(err.Error(), "theirs-too") {
				t.Errorf("list without the feature: %v, want an error that names the first damaged Secret", err)
			}
		}

		// It can delete them, if the request tells it to do so without reading.
		for _, name := range []string{"theirs-three", "theirs-too"} {
			if _, err := k.client(tenant).Get(ctx, name, metav1.GetOptions{}); err == nil || !strings.Contains(err.Error(), "/secrets/"+tenant+"/"+name) {
				t.Errorf("get a damaged Secret: %v, want an error that names it", err)
			}
			if err := k.client(tenant).Delete(ctx, name, metav1.DeleteOptions{}); err == nil {
				t.Error("a damaged Secret is deleted by an ordinary delete")
			}
			k.api.Kubectl("delete", "--raw", "/api/v1/namespaces/"+tenant+"/secrets/"+name+"?ignoreStoreReadErrorWithClusterBreakingPotential=true")
		}
		harness.Eventually(t, 60*time.Second, "the rest to be listed", func() error {
			items, err := list(tenant)
			if err == nil && (len(items) != 1 || items[0].Name != "theirs") {
				err = fmt.Errorf("%d Secrets", len(items))
			}
			return err
		})
	})
}

// errWant is an error without an expected text.
type errWant struct {
	word string
	err  error
}

func (e errWant) Error() string {
	if e.err == nil {
		return "no error, want one with " + e.word
	}
	return e.err.Error() + ", want " + e.word
}
