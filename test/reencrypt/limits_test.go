package reencrypt

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestKeyDisabled checks that values that cannot be encrypted because of their key stay in
// plaintext and are named, and that the run ends.
func TestKeyDisabled(t *testing.T) {
	t.Parallel()
	s, _ := newSite(t, harness.EtcdConfig{})
	s.fill(150)
	s.kms.Disable(true)
	r, out := s.reencrypt(s.config("run", s.cfg), 1)
	if r.Failed != 150 || len(r.Left) != 100 || r.Rewritten != 0 || s.changed(t.Context()) != 0 || !strings.Contains(r.Left[0].Why, "disabled") {
		t.Errorf("report: %s", out)
	}
}

// TestLimits checks that reencrypt finds out etcd's limits if they are lower than usual, and leaves
// and names a value that is too large for etcd once it is encrypted.
func TestLimits(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"3.5", "3.7"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			s, _ := newSite(t, harness.EtcdConfig{Version: version, MaxRequestBytes: 64 << 10, Flags: []string{"--max-txn-ops", "10"}})
			values := s.fill(200)
			edge := bytes.Repeat([]byte("e"), 64<<10-100)
			s.put(prefix+"edge", edge, 0)
			r, out := s.reencrypt(s.config("run", s.cfg), 1, "--txn-keys", "128")
			if r.Rewritten != 200 || r.Failed != 1 || len(r.Left) != 1 || r.Left[0].Key != prefix+"edge" || !strings.Contains(r.Left[0].Why, "raise etcd's --max-request-bytes") {
				t.Errorf("report: %s", out)
			}
			if r.Transactions < 20 || r.Transactions > 60 {
				t.Errorf("%d transactions of up to 10 operations", r.Transactions)
			}
			if got := get(t, s.kv, prefix+"edge"); !bytes.Equal(got.Value, edge) || got.Version != 1 {
				t.Error("what etcd refused was changed")
			}
			if _, err := s.kv.DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte(prefix + "edge")}); err != nil {
				t.Fatal(err)
			}
			s.sealed(values, 2)
		})
	}
}

// TestOtherRules checks that reencrypt does not run while there are proxies that might not be able
// to read the result.
func TestOtherRules(t *testing.T) {
	t.Parallel()
	s, _ := newSite(t, harness.EtcdConfig{})
	values := s.fill(5)
	p := s.StartProxy("proxy", s.cfg)
	p.WaitReady(within)
	other := s.cfg
	other.Rules = []harness.Rule{{Prefix: prefix, WriteWith: "dev", AllowPlaintextReads: new(true)}}
	config := s.config("other", other)
	harness.Eventually(t, within, "the proxy to be announced", func() error {
		if out, _ := s.Run("status", "--config", config); !strings.Contains(out, "NOT as in this configuration") {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	if _, out := s.reencrypt(config, 3); !strings.Contains(out, "proxies have other rules") || s.changed(t.Context()) != 0 {
		t.Errorf("it was not refused: %s", out)
	}
	if r, out := s.reencrypt(s.config("same", s.cfg), 0); r.Rewritten != 5 {
		t.Errorf("with the same rules: %s", out)
	}
	s.opens(p, values)
	if r, out := s.reencrypt(config, 1, "--ignore-proxies"); r.Foreign != 5 {
		t.Errorf("ignored: %s", out)
	}
	if _, code := s.Run("reencrypt", "--config", config, "--prefix", "/elsewhere/"); code != 2 {
		t.Errorf("a prefix without a rule: exit code %d", code)
	}
}
