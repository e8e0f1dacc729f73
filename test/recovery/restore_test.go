package recovery

import (
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestEverythingIsLost loses a whole cluster: the data of three members, the KMS key, the proxy and
// the API server. What is left is a snapshot, the configuration, and an identity that a passphrase
// protects. They bring back the Secrets of an API server.
func TestEverythingIsLost(t *testing.T) {
	s := &site{env: harness.New(t), want: map[string]string{}}
	double := s.env.NewAlibaba()
	cluster := s.env.StartCluster(3, harness.EtcdConfig{})
	safe := newOffline(t, s, "safe")
	ack, off, fresh := s.env.AlibabaKey("ack", double), offlineKMS(safe), s.env.LocalKey("new", 2)
	protected, passphrase := s.protectedFile(t, safe)
	serve := func(name string, rule harness.Rule, kms ...harness.KMSConfig) *harness.Proxy {
		t.Helper()
		rule.Prefix = "/registry/"
		return s.env.StartProxy(name, harness.ProxyConfig{
			Etcd: harness.Upstream{Endpoints: cluster.URLs()}, KMS: kms, Rules: []harness.Rule{rule}, Audit: &harness.Audit{Path: s.auditPath()},
		})
	}
	proxy := serve("before", harness.Rule{WriteWith: "ack", Recovery: []string{"offline"}, RecoveryRequired: true}, ack, off)
	proxy.WaitReady(within)
	api := s.env.StartAPIServer(harness.APIServerConfig{EtcdServers: proxy.URL()})
	want := s.env.Sealed.Value("of a Secret")
	if _, err := api.Client.CoreV1().Secrets("default").Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "db"}, StringData: map[string]string{"password": want},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	snapshot := cluster.Snapshot(0, "saved.db")

	api.Kill()
	proxy.Kill()
	cluster.Lose()
	double.RemoveKey(kmsdouble.DefaultKeyID)

	// From the snapshot and the identity, what can be read is known before anything is restored.
	drill := []string{"drill", "--config", proxy.ConfigFile, "--snapshot", snapshot, "--etcd", harness.Bin(t, "etcd-3.7"), "--etcdutl", harness.Bin(t, "etcdutl-3.7")}
	if out := s.onTerminal(t, passphrase, append(drill, "--identity", protected)...); !strings.Contains(out, "passed: ") {
		t.Errorf("the drill prints %s", out)
	}
	cluster.Restore(snapshot)
	next := s.env.NewProxy("after", harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: cluster.URLs()}, KMS: []harness.KMSConfig{fresh, ack, off}, Audit: &harness.Audit{Path: s.auditPath()},
		Rules: []harness.Rule{{Prefix: "/registry/", WriteWith: "new", ReadWith: []string{"ack"}, Recovery: []string{"offline"}}},
	})
	// The announcement of the proxy is in the snapshot, and its lease has all of its time again.
	if out := s.onTerminal(t, passphrase, "reencrypt", "--ignore-proxies", "--config", next.ConfigFile, "--identity", protected); !strings.Contains(out, " 0 left; ") {
		t.Errorf("reencrypt prints %s", out)
	}
	raw := pb.NewKVClient(harness.Dial(t, cluster.Members[2].Address, nil))
	r, err := raw.Range(t.Context(), &pb.RangeRequest{Key: []byte("/registry/"), RangeEnd: []byte("/registry0")})
	if err != nil || len(r.Kvs) < 10 {
		t.Fatalf("%d values, %v", len(r.GetKvs()), err)
	}
	for _, kv := range r.Kvs {
		if provider, _, _ := envelope.Split(kv.Value); string(provider) != "new" {
			t.Errorf("%s is encrypted by %q", kv.Key, provider)
		}
	}
	next.Start()
	api = s.env.StartAPIServer(harness.APIServerConfig{Name: "restored", EtcdServers: next.URL()})
	got, err := api.Client.CoreV1().Secrets("default").Get(t.Context(), "db", metav1.GetOptions{})
	if err != nil || string(got.Data["password"]) != want {
		t.Errorf("the Secret is not what was written: %v", err)
	}
	if out, code := s.env.Run("audit", "verify", s.commandsPath()); code != 0 {
		t.Errorf("exit code %d: %s", code, out)
	}
}
