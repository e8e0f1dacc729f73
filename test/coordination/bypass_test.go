package coordination

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestBypassAfterReload checks that after a reload no plaintext write to etcd is missed, neither
// under a rule that the reload adds nor under an existing one.
func TestBypassAfterReload(t *testing.T) {
	t.Parallel()
	const added, writes = "/added/", 50
	s := newSite(t)
	p := s.StartProxy("proxy", s.cfg)
	p.WaitReady(within)
	s.agreed(t, prefix)
	past := func(key string) {
		t.Helper()
		if _, err := s.kv.Put(t.Context(), &pb.PutRequest{Key: []byte(key), Value: []byte("in the clear")}); err != nil {
			t.Fatal(err)
		}
	}
	past(added + "before") // no rule covered the key at that time

	more := p.Config
	more.Rules = append(more.Rules[:1:1], harness.Rule{Prefix: added, WriteWith: "dev", AllowPlaintextReads: new(true)})
	data, err := json.Marshal(more)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(p.ConfigFile, data, 0o600); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, within, "the reload", func() error {
		if !strings.Contains(p.Log(), `"msg":"configuration reloaded"`) {
			return fmt.Errorf("the log does not tell of it")
		}
		return nil
	})
	for range writes {
		past(added + "a")
		past(prefix + "a")
	}
	harness.Eventually(t, within, "all writes to be seen", func() error {
		m := p.Scrape()
		for _, rule := range []string{added, prefix} {
			if line := fmt.Sprintf("etcd_kms_proxy_plaintext_writes_seen_total{rule=%q} %d\n", rule, writes); !strings.Contains(m, line) {
				_, after, _ := strings.Cut(m, fmt.Sprintf("writes_seen_total{rule=%q}", rule))
				seen, _, _ := strings.Cut(after, "\n")
				return fmt.Errorf("under %s:%s of %d", rule, seen, writes)
			}
		}
		return nil
	})
}
