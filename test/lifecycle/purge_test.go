package lifecycle

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestPurgeWaitsForEachMember checks that purge waits for a member that is slow to compact before
// it defragments its database, and names a member that does not finish instead of reporting it as
// done. This also applies if the history contains nothing any more.
func TestPurgeWaitsForEachMember(t *testing.T) {
	t.Parallel()
	for version, flag := range map[string]string{"3.5": "--experimental-compaction-", "3.7": "--compaction-"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			env := harness.New(t)
			cluster := env.StartCluster(3, harness.EtcdConfig{Version: version, Bare: true})
			slow := cluster.Members[2]
			// The proxy's endpoint is another member, so that this one responds.
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
			out := s.run(t, 1, "purge --yes", "100 old plaintext values removed")
			if strings.Contains(out, "may still have") {
				t.Errorf("it was not waited for:\n%s", out)
			}
			clean(slow)

			fill("1h")
			s.run(t, 1, "purge --yes --compact-timeout 2s", "100 old plaintext values removed", slow.URL+" may still have the old values, and is not defragmented")
			clean(cluster.Members[0])
			slow.Kill()
			db := filepath.Join(slow.DataDir, "member", "snap", "db")
			s.run(t, 1, "verify --snapshot "+db)
			slow.Flags[1] = flag + "sleep-interval=100ms"
			slow.Start()
			if out := s.run(t, 1, "purge --yes", "holds no plaintext"); strings.Contains(out, "may still have") {
				t.Errorf("it was not waited for:\n%s", out)
			}
			clean(slow)
		})
	}
}

// TestNothingIsLeft checks that after re-encryption, a purge, and the removal of write-ahead logs
// that purge leaves to the operator, neither verify nor a search of every file of every member
// finds plaintext. Before, both do.
func TestNothingIsLeft(t *testing.T) {
	t.Parallel()
	size := 3
	if testing.Short() {
		size = 1
	}
	env := harness.New(t)
	// etcd starts a new write-ahead log when one has 64 MB, and deletes logs before a snapshot at
	// its start and every 30 seconds.
	cluster := env.StartCluster(size, harness.EtcdConfig{Bare: true, Flags: []string{"--snapshot-count", "10", "--max-wals", "1", "--max-snapshots", "1"}})
	p := env.StartProxy("proxy", harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: cluster.URLs()}, KMS: []harness.KMSConfig{env.LocalKey("dev", 1)}, Rules: []harness.Rule{{Prefix: prefix, WriteWith: "dev"}},
	})
	p.WaitReady(within)
	s := &site{Env: env, proxy: p}
	raw := pb.NewKVClient(harness.Dial(t, cluster.Members[0].Address, nil))
	for i := range 20 {
		put(t, raw, fmt.Sprint(prefix, i), mark+"-"+strings.Repeat("x", 20_000))
	}
	look := func(code int) {
		t.Helper()
		for _, m := range cluster.Members {
			m.Kill()
		}
		for _, m := range cluster.Members {
			s.verify(t, code, "--data-dir "+m.DataDir+" --canary "+mark)
			if found := files(t, m.DataDir, mark); (len(found) > 0) != (code == 1) {
				t.Errorf("grep finds it in %v", found)
			}
		}
		for _, m := range cluster.Members {
			m.Begin()
		}
		for _, m := range cluster.Members {
			m.WaitReady()
		}
	}
	look(1)
	s.run(t, 0, "reencrypt")
	s.run(t, 1, "purge --yes", "20 old plaintext values removed", "write-ahead logs of each member (member/wal)")
	look(1) // fills the logs
	filler := strings.Repeat("f", 1<<20)
	for range 70 {
		put(t, raw, "/clear/filler", filler)
	}
	for i := range 25 {
		put(t, raw, "/clear/behind", fmt.Sprint(i)) // for a snapshot after the first log
	}
	for _, m := range cluster.Members {
		harness.Eventually(t, within, "a snapshot behind the first log", func() error { return behindFirstLog(m.DataDir) })
		m.Kill()
		m.Start()
		harness.Eventually(t, within, "the first log to go", func() error {
			logs, err := filepath.Glob(filepath.Join(m.DataDir, "member", "wal", "0000000000000000-*.wal"))
			if err == nil && len(logs) > 0 {
				err = fmt.Errorf("%v is there", logs)
			}
			return err
		})
	}
	look(0)
}

// behindFirstLog returns nil if the newest snapshot of a member is later than the beginning of its
// second log. The names of both contain the raft index.
func behindFirstLog(dir string) error {
	newest := func(pattern string) (index uint64, err error) {
		names, err := filepath.Glob(filepath.Join(dir, "member", pattern))
		for _, name := range names { // in order
			var first uint64
			if _, err := fmt.Sscanf(filepath.Base(name), "%x-%x", &first, &index); err != nil {
				return 0, err
			}
		}
		return index, err
	}
	snapshot, err := newest("snap/*.snap")
	if err != nil {
		return err
	}
	log, err := newest("wal/*.wal")
	if err == nil && (log == 0 || snapshot <= log) {
		err = fmt.Errorf("the newest snapshot is at %d, the newest log from %d", snapshot, log)
	}
	return err
}

// TestFreedLargeValue checks that a value over many pages is found after its pages are freed, by
// its beginning, and by a canary at its end.
func TestFreedLargeValue(t *testing.T) {
	t.Parallel()
	s := newSite(t, "3.7", nil)
	const tail = "the-end-of-a-large-value"
	for i := range 5 {
		put(t, s.raw, fmt.Sprint(prefix, "large", i), mark+"-"+strings.Repeat("x", 300_000)+tail)
	}
	r, err := s.raw.DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte(prefix), RangeEnd: []byte(prefix + "z")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.raw.Compact(t.Context(), &pb.CompactionRequest{Revision: r.Header.Revision, Physical: true}); err != nil {
		t.Fatal(err)
	}
	s.verify(t, 0, "")
	v, places := s.verify(t, 1, "--snapshot "+s.etcd.Snapshot("snap/freed.db")+" --canary "+tail)
	needs(t, places, "snap canary")
	found := 0
	for _, f := range v.List {
		if f.Place == "remains" && strings.HasPrefix(f.Key, prefix+"large") {
			found++
		}
		if f.Place == "live" || f.Place == "history" {
			t.Errorf("it is not freed: %+v", f)
		}
	}
	if found == 0 {
		t.Errorf("no remains of it: %v", places)
	}
}

// TestPurgeWithALearner checks that purge names a learner, which accepts neither compactions nor
// defragmentations from clients, and purges the others.
func TestPurgeWithALearner(t *testing.T) {
	t.Parallel()
	env := harness.New(t)
	cluster := env.StartCluster(1, harness.EtcdConfig{Bare: true})
	p := env.StartProxy("proxy", harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: cluster.URLs()}, KMS: []harness.KMSConfig{env.LocalKey("dev", 1)}, Rules: []harness.Rule{{Prefix: prefix, WriteWith: "dev"}},
	})
	p.WaitReady(within)
	s := &site{Env: env, proxy: p}
	voter := cluster.Members[0]
	put(t, pb.NewKVClient(harness.Dial(t, voter.Address, nil)), prefix+"a", mark)
	s.run(t, 0, "reencrypt")
	learner := cluster.AddLearner()
	harness.Eventually(t, within, "the learner to be known by its URL", func() error {
		if out, _ := s.Run("purge", "--dry-run", "--config", p.ConfigFile); !strings.Contains(out, learner.URL) {
			return fmt.Errorf("purge says %s", out)
		}
		return nil
	})
	out := s.run(t, 1, "purge --yes", "1 old plaintext value removed", learner.URL+" may still have the old values", "learner")
	if strings.Contains(out, voter.URL+" may still have") {
		t.Errorf("the voter is not purged:\n%s", out)
	}
	s.run(t, 0, "verify")
}
