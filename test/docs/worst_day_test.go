package docs

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestWorstDay loses, one after the other, what the page says, and recovers as it says. At the end,
// only a snapshot, the configuration and an identity are left.
func TestWorstDay(t *testing.T) {
	t.Parallel()
	s := newSite(t, "guides/worst-day.md")
	defer s.done()
	backup := filepath.Join(s.env.Dir, "backup")
	if err := os.Mkdir(backup, 0o700); err != nil {
		t.Fatal(err)
	}
	s.means("/backup/", backup+"/")
	parts := func(n int) (kms, rules string) {
		kms, rules, ok := strings.Cut(s.yaml(n), "rules:\n")
		if !ok {
			t.Fatalf("yaml block %d has no rules", n)
		}
		return strings.TrimPrefix(kms, "kms:\n"), rules
	}
	// set uses the keys and rules of a block of the page in the configuration
	set := func(n int) {
		t.Helper()
		kms, rules := parts(n)
		s.configure(s.here("- name: main\n  local: {keyFile: /etc/etcd-kms-proxy/key.yaml}\n"), kms, "- prefix: /registry/secrets/\n  writeWith: main\n", rules)
	}
	s.newKey("key")
	s.newKey("dr")
	// a recipient of Debian's age, as everybody has it
	s.shell("age-keygen -o identity.txt && age-keygen -y identity.txt >recipients.txt")
	set(1)
	s.serve() // so that there is a record of the rules
	s.proxy.Stop(within)
	for n := range 3 {
		s.put(secret(n + 1))
	}
	s.shell("etcd-kms-proxy reencrypt")
	s.shell("etcd-kms-proxy purge --yes")
	s.shell("etcdctl --endpoints 127.0.0.1:2379 snapshot save /backup/etcd.db")

	s.run(1) // the drill
	s.run(2) // without copies
	s.run(3) // the account
	s.run(4) // the region
	s.run(5) // the key file
	s.serve()
	s.proxy.Stop(within)
	s.shell("etcd-kms-proxy purge --yes && rm /backup/etcd.db && etcdctl --endpoints 127.0.0.1:2379 snapshot save /backup/etcd.db")
	s.run(6) // a rotation
	s.run(7) // the configuration
	s.run(8) // the identity
	s.shell("mv new.txt identity.txt && rm /backup/etcd.db")
	s.run(9) // a backup

	s.run(10) // a bypass
	s.shell("sed 's/name: main/name: primary/; s/writeWith: main/writeWith: primary/' config.yaml >renamed.yaml")
	s.run(11)

	// Everything is lost.
	s.etcd.Stop(within)
	for _, name := range []string{s.etcd.DataDir, "key.yaml", "dr.yaml", "lost.yaml"} {
		if !filepath.IsAbs(name) {
			name = filepath.Join(s.env.Dir, name)
		}
		if err := os.RemoveAll(name); err != nil {
			t.Fatal(err)
		}
	}
	restored := filepath.Join(s.env.Dir, "restored")
	s.means(s.etcd.DataDir+"-restored", restored)
	s.run(12)
	s.etcd = s.env.StartEtcd(harness.EtcdConfig{Bare: true, Address: s.etcd.Address, Restored: restored})
	s.raw = pb.NewKVClient(harness.Dial(t, s.etcd.Address, nil))
	set(2)
	s.run(13)
	s.serve("--allow-weakening")
	s.proxy.Stop(within)
	s.serve()
	if got := s.shell("etcdctl --endpoints 127.0.0.1:12379 get --print-value-only /registry/secrets/default/s2"); got != "plaintext-canary-2\n" {
		t.Errorf("the value is %q", got)
	}
}
