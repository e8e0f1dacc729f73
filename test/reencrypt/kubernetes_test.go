package reencrypt

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestKubernetesWatch checks that a client of kube-apiserver whose watch breaks after every change
// receives each re-encrypted Secret nevertheless. This is why one transaction rewrites one value:
// if several change at one revision, the client receives only the first, because it continues after
// that revision. The second half of the test shows this. If it fails, kube-apiserver has been
// improved.
func TestKubernetesWatch(t *testing.T) {
	t.Parallel()
	s, _ := newSite(t, harness.EtcdConfig{})
	s.cfg.Rules[0].Prefix = "/registry/secrets/"
	p := s.StartProxy("proxy", s.cfg)
	p.WaitReady(within)
	api := s.StartAPIServer(harness.APIServerConfig{EtcdServers: p.URL()})
	secrets := api.Client.CoreV1().Secrets("default")
	const n = 30
	for i := range n {
		secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("secret-%02d", i)}, StringData: map[string]string{"value": s.Sealed.Value(fmt.Sprint(i))}}
		if _, err := secrets.Create(t.Context(), secret, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	config := s.config("run", s.cfg)
	for _, test := range []struct {
		txnKeys string
		all     bool
	}{{"1", true}, {"100", false}} {
		list, err := secrets.List(t.Context(), metav1.ListOptions{})
		if err != nil {
			t.Fatal(err)
		}
		s.kms.Rotate()
		if r, out := s.reencrypt(config, 0, "--txn-keys", test.txnKeys); r.Rewritten < n {
			t.Fatalf("too few: %s", out)
		}
		// The end of what the client has to receive.
		last, err := secrets.Create(t.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "last-" + test.txnKeys}}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		seen := map[string]int{}
		for at := list.ResourceVersion; at != last.ResourceVersion; {
			name, next := s.nextChange(api, at)
			seen[name]++
			at = next
		}
		delete(seen, last.Name)
		for name, times := range seen {
			if times != 1 {
				t.Errorf("%s keys a transaction: %s was seen %d times", test.txnKeys, name, times)
			}
		}
		if (len(seen) == n) != test.all {
			t.Errorf("%s keys a transaction: %d of %d changes were seen", test.txnKeys, len(seen), n)
		}
	}
}

// nextChange watches the Secrets from a resource version until the first change, like a client
// whose watch then breaks.
func (s *site) nextChange(api *harness.APIServer, after string) (name, version string) {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
	defer cancel()
	w, err := api.Client.CoreV1().Secrets("default").Watch(ctx, metav1.ListOptions{ResourceVersion: after})
	if err != nil {
		s.t.Fatal(err)
	}
	defer w.Stop()
	event, ok := <-w.ResultChan()
	secret, isSecret := event.Object.(*corev1.Secret)
	if !ok || !isSecret {
		s.t.Fatalf("watch after %s: %v", after, event)
	}
	return secret.Name, secret.ResourceVersion
}

// TestKubectl checks that somebody with access only to the API server can encrypt Secrets from
// before the proxy, and re-encrypt them after a rotation, by changing each of them. The API server
// does not write a replacement without a change.
func TestKubectl(t *testing.T) {
	t.Parallel()
	s, etcd := newSite(t, harness.EtcdConfig{})
	s.cfg.Rules[0].Prefix = secretsPrefix
	before := s.StartAPIServer(harness.APIServerConfig{EtcdServers: etcd.URL})
	const n = 12
	for i := range n {
		secret := &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("s%d", i)}, StringData: map[string]string{"value": fmt.Sprint(i)}}
		if _, err := before.Client.CoreV1().Secrets("default").Create(t.Context(), secret, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	before.Kill()
	p := s.StartProxy("proxy", s.cfg)
	p.WaitReady(within)
	api := s.StartAPIServer(harness.APIServerConfig{Name: "after", EtcdServers: p.URL()})
	status := func(code int, want string) {
		t.Helper()
		// The proxy learns of a rotation at the next poll.
		harness.Eventually(t, within, "status "+want, func() error {
			out, got := s.Run("status", "--config", p.ConfigFile, "--output", "json")
			if got != code || !strings.Contains(out, want) {
				return fmt.Errorf("exit code %d: %s", got, out)
			}
			return nil
		})
	}
	status(1, fmt.Sprintf(`"plaintext": %d`, n))
	objects := s.File("secrets.json", []byte(api.Kubectl("get", "secrets", "--all-namespaces", "--output", "json")))
	if out := api.Kubectl("replace", "--filename", objects); strings.Count(out, " replaced") != n {
		t.Errorf("kubectl replace: %s", out)
	}
	status(1, fmt.Sprintf(`"plaintext": %d`, n))
	annotate := func(value string) {
		t.Helper()
		if out := api.Kubectl("annotate", "secrets", "--all", "--all-namespaces", "--overwrite", "resealed="+value); strings.Count(out, " annotated") != n {
			t.Errorf("kubectl annotate: %s", out)
		}
	}
	annotate("1")
	status(0, fmt.Sprintf(`"current": %d`, n))
	s.kms.Rotate()
	status(1, fmt.Sprintf(`"stale": %d`, n))
	harness.Eventually(t, within, "the proxy to seal under the new key", func() error {
		if !strings.Contains(p.Log(), `"keyID":"`+s.kms.KeyID()+`","keyIDAsStatus"`) {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	annotate("2")
	status(0, fmt.Sprintf(`"current": %d`, n))
}
