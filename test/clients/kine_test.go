package clients

import (
	"bytes"
	"fmt"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestKine runs a kube-apiserver on a proxy in front of kine. kine supports only a few shapes of
// transactions, and would refuse one that the proxy had changed.
func TestKine(t *testing.T) {
	t.Parallel()
	env := harness.New(t)
	kine := env.StartKine()
	proxy := env.StartProxy("proxy", harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: []string{kine.URL}}, KMS: []harness.KMSConfig{env.LocalKey("dev", 1)},
		Rules: []harness.Rule{{Prefix: "/registry/secrets/", WriteWith: "dev", AllowPlaintextReads: new(false)}},
	})
	proxy.WaitReady(within)
	proxy.RecordTested("kube-apiserver on kine")
	api := env.StartAPIServer(harness.APIServerConfig{EtcdServers: proxy.URL()})
	secrets := api.Client.CoreV1().Secrets("default")
	ctx := t.Context()
	seen, err := secrets.Watch(ctx, metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer seen.Stop()
	const n = 20
	for i := range n {
		s := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("s%02d", i)}, StringData: map[string]string{"value": env.Sealed.Value(fmt.Sprint(i))}}
		s, err := secrets.Create(ctx, s, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		s.Data["more"] = []byte(env.Sealed.Value("more"))
		if _, err := secrets.Update(ctx, s, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
		if i%2 == 1 {
			if err := secrets.Delete(ctx, s.Name, metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		}
	}
	list, err := secrets.List(ctx, metav1.ListOptions{Limit: 3})
	for err == nil && list.Continue != "" {
		var next *corev1.SecretList
		if next, err = secrets.List(ctx, metav1.ListOptions{Limit: 3, Continue: list.Continue}); err == nil {
			next.Items = append(list.Items, next.Items...)
			list = next
		}
	}
	if err != nil || len(list.Items) != n/2 || string(list.Items[3].Data["value"]) != env.Sealed.Value("6") {
		t.Errorf("%d Secrets: %v", len(list.Items), err)
	}
	counts := map[watch.EventType]int{}
	for range n + n + n/2 {
		counts[(<-seen.ResultChan()).Type]++
	}
	if counts[watch.Added] != n || counts[watch.Modified] != n || counts[watch.Deleted] != n/2 {
		t.Errorf("events: %v", counts)
	}
	stored, err := pb.NewKVClient(harness.Dial(t, kine.Address, nil)).Range(ctx, &pb.RangeRequest{Key: []byte("/registry/secrets/"), RangeEnd: []byte("/registry/secrets0")})
	if err != nil || len(stored.Kvs) != n/2 {
		t.Fatalf("%v, %v", stored, err)
	}
	for _, kv := range stored.Kvs {
		if !bytes.HasPrefix(kv.Value, []byte("k8s:enc:kms:v2:dev:")) {
			t.Errorf("%s is not sealed", kv.Key)
		}
	}
}
