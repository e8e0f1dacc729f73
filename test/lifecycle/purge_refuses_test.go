package lifecycle

import (
	"fmt"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestPurgeRefuses checks that purge keeps the history if a proxy writes plaintext or a KMS does
// not answer, although every value is current.
func TestPurgeRefuses(t *testing.T) {
	t.Parallel()
	s := newSite(t, "3.7", func(c *harness.ProxyConfig) {
		c.Rules[0].AllowPlaintextReads = new(true)
	})
	kms := s.NewKMS("kms")
	kms.Start()
	put(t, s.kv, prefix+"a", s.Sealed.Value("a"))
	plain := s.proxy.Config
	plain.Rules = []harness.Rule{{Prefix: prefix, WriteWith: "plaintext", ReadWith: []string{"dev"}, AllowPlaintextReads: new(true)}}
	plain.Listeners, plain.Admin.Address, plain.Audit = nil, "", nil
	other := s.NewProxy("other", plain)
	other.Args = []string{"--allow-weakening"}
	other.Start()
	other.WaitReady(within)
	harness.Eventually(t, within, "the other proxy to be announced", func() error {
		if out, code := s.Run("status", "--config", s.proxy.ConfigFile); code != 1 || !strings.Contains(out, "NOT as in this") {
			return fmt.Errorf("exit code %d: %s", code, out)
		}
		return nil
	})
	s.run(t, 3, "purge --yes", "proxies have other rules", "--ignore-proxies")
	s.run(t, 3, "purge --dry-run", "proxies have other rules")
	s.run(t, 1, "purge --yes --ignore-proxies", "left to do")
	other.Stop(within)
	s.run(t, 1, "purge --yes", "left to do")

	// This includes a KMS that no rule writes with now.
	spare := s.proxy.Config
	spare.KMS = append(spare.KMS, kms.Config("spare"))
	spare.Rules[0].ReadWith = []string{"spare"}
	s.proxy.Stop(within)
	s.proxy = s.NewProxy("spare", spare)
	s.run(t, 1, "purge --yes", "left to do")
	kms.Stop()
	s.run(t, 3, "purge --yes --timeout 2s", `KMS provider "spare"`)
}
