package recovery

import (
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestSnapshotIsOpened decrypts a snapshot when etcd and the primary key are lost, with only the
// configuration and the recovery key: for a key that its KMS reports as deleted, and for a KMS that
// does not exist.
func TestSnapshotIsOpened(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	double := s.env.NewAlibaba()
	ack, dr := s.env.AlibabaKey("ack", double), s.env.LocalKey("dr", 1)
	rule := harness.Rule{WriteWith: "ack", Recovery: []string{"dr"}, RecoveryRequired: true}
	s.run(t, rule, ack, dr)
	s.proxy.WaitReady(within)
	// it is printed, so it must not be one that the harness searches for
	const value = "opened in an emergency"
	s.fill(t, "key", 3)
	if err := s.put(t, prefix+"shown", value); err != nil {
		t.Fatal(err)
	}
	snapshot := s.etcd.Snapshot("saved.db")
	s.proxy.Stop(within)
	s.etcd.Kill()

	rule.Prefix = prefix
	decrypt := func(code int, kms, recovery harness.KMSConfig) string {
		t.Helper()
		p := s.env.NewProxy("decrypt", harness.ProxyConfig{
			Etcd: harness.Upstream{Endpoints: []string{s.etcd.URL}}, KMS: []harness.KMSConfig{kms, recovery}, Rules: []harness.Rule{rule},
			Audit: &harness.Audit{Path: s.auditPath()},
		})
		args := []string{"--config", p.ConfigFile, "--timeout", "2s", "--snapshot", snapshot}
		out, got := s.env.Run(append([]string{"decrypt", "--yes", prefix + "shown"}, args...)...)
		if got != code {
			t.Fatalf("exit code %d, want %d: %s", got, code, out)
		}
		// verify must find that what is read in this way is encrypted.
		if v, got := s.env.Run(append([]string{"verify"}, args...)...); (got == 0) != (code == 0) {
			t.Errorf("verify: exit code %d: %s", got, v)
		}
		return out
	}
	opened := func(out string) {
		t.Helper()
		if !strings.HasSuffix(out, value) || !strings.Contains(out, "decrypted by recovery copies of their DEK seeds") {
			t.Errorf("it prints %q", out)
		}
	}
	opened(decrypt(0, s.unreachable("ack"), dr))
	double.RemoveKey(kmsdouble.DefaultKeyID)
	opened(decrypt(0, ack, dr))
	// The recovery key makes it possible: without any key, nothing decrypts.
	if out := decrypt(3, s.unreachable("ack"), s.unreachable("dr")); strings.Contains(out, value) {
		t.Error("it opens without a key")
	}
}
