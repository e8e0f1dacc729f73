package reencrypt

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"strings"
	"syscall"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestKilled kills reencrypt at random moments, repeatedly. The last run must continue where the
// others stopped: no value may be written twice, and none lost.
func TestKilled(t *testing.T) {
	t.Parallel()
	for _, txnKeys := range []string{"1", "20"} {
		t.Run(txnKeys, func(t *testing.T) {
			t.Parallel()
			s, _ := newSite(t, harness.EtcdConfig{})
			values := s.fill(600)
			config := s.config("run", s.cfg)
			for n := range 5 {
				before := s.changed(t.Context())
				p := s.Spawn(fmt.Sprintf("killed-%d", n), "reencrypt", "--config", config, "--rate", "300", "--txn-keys", txnKeys)
				harness.Eventually(t, within, "some values to be rewritten", func() error {
					if s.changed(t.Context()) <= before+rand.IntN(50) {
						return fmt.Errorf("none yet")
					}
					return nil
				})
				p.Kill()
				// Its pending writes and its election end with the process; its lease would make
				// the next one wait.
				s.revokeAll()
			}
			done := s.changed(t.Context())
			if done == 0 || done == len(values) {
				t.Fatalf("%d of %d values were rewritten by those that were killed: not in the middle", done, len(values))
			}
			if r, out := s.reencrypt(config, 0); r.Rewritten != int64(len(values)-done) || r.Current != int64(done) {
				t.Errorf("after %d: %s", done, out)
			}
			s.sealed(values, 2)
			p := s.StartProxy("reader", s.cfg)
			p.WaitReady(within)
			s.opens(p, values)
		})
	}
}

// revokeAll ends all leases, as time would.
func (s *site) revokeAll() {
	s.t.Helper()
	leases := pb.NewLeaseClient(s.conn)
	r, err := leases.LeaseLeases(s.t.Context(), &pb.LeaseLeasesRequest{})
	if err != nil {
		s.t.Fatal(err)
	}
	for _, l := range r.Leases {
		if _, err := leases.LeaseRevoke(s.t.Context(), &pb.LeaseRevokeRequest{ID: l.ID}); err != nil {
			s.t.Fatal(err)
		}
	}
}

// TestInterrupted checks that a signal ends reencrypt with a report of what it did, and that the
// next run continues.
func TestInterrupted(t *testing.T) {
	t.Parallel()
	s, _ := newSite(t, harness.EtcdConfig{})
	values := s.fill(400)
	config := s.config("run", s.cfg)
	p := s.Spawn("interrupted", "reencrypt", "--config", config, "--rate", "200", "--output", "json")
	harness.Eventually(t, within, "some values to be rewritten", func() error {
		if s.changed(t.Context()) < 20 {
			return fmt.Errorf("too few yet")
		}
		return nil
	})
	if !p.Stop(within) {
		t.Fatal("it did not end by itself")
	}
	r, done := decode(t, p.Log()), int64(s.changed(t.Context()))
	if code := p.Wait(within); code != 3 || !r.Interrupted || r.OK || r.Rewritten != done || !strings.Contains(p.Log(), "hint: no value is half done") {
		t.Errorf("exit code %d after %d values: %s", code, done, p.Log())
	}
	if r, out := s.reencrypt(config, 0); r.Rewritten != int64(len(values))-done {
		t.Errorf("after %d: %s", done, out)
	}
	s.sealed(values, 2)
}

// TestOneAtATime checks that the second of two runs waits and says for which, that with --no-wait
// it does not, and that it takes over when the first one dies or hangs.
func TestOneAtATime(t *testing.T) {
	t.Parallel()
	s, _ := newSite(t, harness.EtcdConfig{})
	values := s.fill(600)
	config := s.config("run", s.cfg)
	first := s.Spawn("first", "reencrypt", "--config", config, "--rate", "5")
	harness.Eventually(t, within, "the first one to begin", func() error {
		if s.changed(t.Context()) == 0 {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	holder := fmt.Sprintf("process %d", first.PID())
	if _, out := s.reencrypt(config, 3, "--no-wait"); !strings.Contains(out, holder) {
		t.Errorf("--no-wait does not say who: %s", out)
	}
	second := s.Spawn("second", "reencrypt", "--config", config)
	waitOutput(t, second, "waiting: another reencrypt is at work")
	if !strings.Contains(second.Log(), holder) {
		t.Errorf("it does not say who: %s", second.Log())
	}
	// as if its machine had stopped
	if err := syscall.Kill(first.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	if code := second.Wait(within); code != 0 {
		t.Errorf("exit code %d: %s", code, second.Log())
	}
	s.sealed(values, 2)
	if err := syscall.Kill(first.PID(), syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	if code := first.Wait(within); code != 0 || !strings.Contains(first.Log(), "the lease of the process that does it has ended") {
		t.Errorf("the first one, awake again: exit code %d: %s", code, first.Log())
	}
	s.sealed(values, 2)
}

// TestNoSpace checks that reencrypt reports that etcd has no space left, with a remedy, waits, and
// continues afterwards.
func TestNoSpace(t *testing.T) {
	t.Parallel()
	s, _ := newSite(t, harness.EtcdConfig{Flags: []string{"--quota-backend-bytes", fmt.Sprint(16 << 20)}})
	const ballast = "/ballast/" // what the operator can free; without it, too little space remains
	for i := range 100 {
		s.put(fmt.Sprintf("%s%03d", ballast, i), bytes.Repeat([]byte{byte(i)}, 100<<10), 0)
	}
	values := make(map[string][]byte)
	for i := range 40 {
		key := fmt.Sprintf("%s%03d", prefix, i)
		values[key] = bytes.Repeat([]byte{byte(i)}, 100<<10)
		s.put(key, values[key], 0)
	}
	maintenance := pb.NewMaintenanceClient(s.conn)
	// its size is that of the last commit
	harness.Eventually(t, within, "etcd to commit the values to its database", func() error {
		status, err := maintenance.Status(t.Context(), &pb.StatusRequest{})
		if err == nil && status.DbSizeInUse < 13<<20 {
			err = fmt.Errorf("%d bytes", status.DbSizeInUse)
		}
		return err
	})
	p := s.Spawn("full", "reencrypt", "--config", s.config("run", s.cfg), "--rate", "100", "--output", "json")
	waitOutput(t, p, "it has no space left: compact and defragment it")
	if !strings.Contains(p.Log(), "of its quota of 16.0 MiB") {
		t.Errorf("it did not warn: %s", p.Log())
	}
	spared, err := s.kv.DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte(ballast), RangeEnd: []byte("/ballast0")})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.kv.Compact(t.Context(), &pb.CompactionRequest{Revision: spared.Header.Revision, Physical: true}); err != nil {
		t.Fatal(err)
	}
	if _, err := maintenance.Defragment(t.Context(), &pb.DefragmentRequest{}); err != nil {
		t.Fatal(err)
	}
	alarms, err := maintenance.Alarm(t.Context(), &pb.AlarmRequest{})
	if err != nil || len(alarms.Alarms) == 0 {
		t.Fatalf("alarms: %v, %v", alarms, err)
	}
	for _, a := range alarms.Alarms {
		if _, err := maintenance.Alarm(t.Context(), &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE, MemberID: a.MemberID, Alarm: a.Alarm}); err != nil {
			t.Fatal(err)
		}
	}
	if code := p.Wait(within); code != 0 || strings.Count(p.Log(), "it has no space left") != 1 || !strings.Contains(p.Log(), "continuing (writing to etcd)") {
		t.Errorf("exit code %d: %s", code, p.Log())
	}
	s.sealed(values, 2)
}

// TestMembers kills the leader of three members and starts it again, then another member, and then
// all of them.
func TestMembers(t *testing.T) {
	t.Parallel()
	s := &site{Env: harness.New(t), t: t}
	cluster := s.StartCluster(3, harness.EtcdConfig{Bare: true})
	s.on(cluster.Members[0].Address, cluster.URLs()...)
	values := s.fill(1500)
	p := s.Spawn("run", "reencrypt", "--config", s.config("run", s.cfg), "--rate", "250", "--workers", "4", "--output", "json")
	some := func(n int) {
		t.Helper()
		harness.Eventually(t, within, fmt.Sprintf("%d values to be rewritten", n), func() error {
			if now := s.changed(t.Context()); now < n {
				return fmt.Errorf("%d are", now)
			}
			return p.Alive()
		})
	}
	some(100)
	leader := cluster.Leader()
	leader.Kill()
	if leader == cluster.Members[0] {
		leader.Start() // the tests' own connection
		some(200)
	} else {
		some(200)
		leader.Start()
	}
	cluster.Members[1].Kill()
	cluster.Members[2].Kill()
	waitOutput(t, p, "waiting (")
	// Neither responds before the other one runs.
	cluster.Members[1].Begin()
	cluster.Members[2].Start()
	if code := p.Wait(within); code != 0 || !strings.Contains(p.Log(), "continuing (") {
		t.Errorf("exit code %d: %s", code, p.Log())
	}
	r := decode(t, p.Log())
	if r.Rewritten != int64(len(values)) || r.Raced != 0 {
		t.Errorf("%d rewritten, %d raced, want %d and none: %s", r.Rewritten, r.Raced, len(values), p.Log())
	}
	s.sealed(values, 2)
}

// TestKMSDown checks that reencrypt waits for a KMS that does not answer, and says so.
func TestKMSDown(t *testing.T) {
	t.Parallel()
	s, _ := newSite(t, harness.EtcdConfig{})
	values := s.fill(600)
	s.cfg.Cache = &harness.Cache{SealUnreachableFor: "0s"}
	p := s.Spawn("run", "reencrypt", "--config", s.config("run", s.cfg), "--rate", "100", "--output", "json")
	harness.Eventually(t, within, "the first values to be rewritten", func() error {
		if s.changed(t.Context()) == 0 {
			return fmt.Errorf("not yet")
		}
		return nil
	})
	s.kms.Stop()
	waitOutput(t, p, `waiting (the KMS): rule "/sealed/": KMS provider "main"`)
	before := s.changed(t.Context())
	s.kms.Start()
	if code := p.Wait(within); code != 0 || !strings.Contains(p.Log(), "continuing (the KMS)") {
		t.Errorf("exit code %d: %s", code, p.Log())
	}
	if before == 0 || before >= len(values) {
		t.Errorf("%d values were rewritten before: not in the middle", before)
	}
	s.sealed(values, 2)
}
