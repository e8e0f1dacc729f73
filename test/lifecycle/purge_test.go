package lifecycle

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestPurgeWaitsForEachMember: each member compacts in its own time. A slow one is waited for, before its database is written anew with what it had not dropped yet;
// one that does not end is named, and not taken for done. So also where the history holds nothing any more.
func TestPurgeWaitsForEachMember(t *testing.T) {
	t.Parallel()
	for version, flag := range map[string]string{"3.5": "--experimental-compaction-", "3.7": "--compaction-"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			env := harness.New(t)
			cluster := env.StartCluster(3, harness.EtcdConfig{Version: version, Bare: true})
			slow := cluster.Members[2]
			// The proxy knows one of the others, so that it is the one that answers.
			p := env.StartProxy("proxy", harness.ProxyConfig{
				Etcd: harness.Upstream{Endpoints: []string{cluster.Members[0].URL}}, KMS: []harness.KMSConfig{env.LocalKey("dev", 1)},
				Rules: []harness.Rule{{Prefix: prefix, WriteWith: "dev"}},
			})
			p.WaitReady(within)
			s := &site{Env: env, proxy: p}
			raw := pb.NewKVClient(harness.Dial(t, cluster.Members[0].Address, nil))
			rounds := 0
			fill := func(sleep string) {
				t.Helper()
				slow.Kill()
				slow.Flags = []string{flag + "batch-limit=10", flag + "sleep-interval=" + sleep}
				slow.Start()
				for i := range 100 {
					put(t, raw, fmt.Sprintf("%sr%d-%d", prefix, rounds, i), mark+"-"+strings.Repeat("x", 500))
				}
				rounds++
				s.run(t, 0, "reencrypt")
			}
			clean := func(m *harness.Member) {
				t.Helper()
				m.Kill()
				s.run(t, 0, "verify --snapshot "+filepath.Join(m.DataDir, "member", "snap", "db")+" --canary "+mark)
				m.Start()
			}
			fill("100ms")
			out := s.run(t, 1, "purge --yes", "100 old plaintext values dropped")
			if strings.Contains(out, "not proven") {
				t.Errorf("it was not waited for:\n%s", out)
			}
			clean(slow)

			fill("1h")
			s.run(t, 1, "purge --yes --compact-timeout 2s", "100 old plaintext values dropped", slow.URL+" is not proven to have dropped the old values, and is not defragmented")
			clean(cluster.Members[0])
			slow.Kill()
			db := filepath.Join(slow.DataDir, "member", "snap", "db")
			s.run(t, 1, "verify --snapshot "+db)
			slow.Flags[1] = flag + "sleep-interval=100ms"
			slow.Start()
			if out := s.run(t, 1, "purge --yes", "holds no plaintext"); strings.Contains(out, "not proven") {
				t.Errorf("it was not waited for:\n%s", out)
			}
			clean(slow)
		})
	}
}
