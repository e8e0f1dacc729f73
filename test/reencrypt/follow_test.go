package reencrypt

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// underKey waits until status reports that all values are under the current key of the KMS.
func (s *site) underKey(config string) {
	s.t.Helper()
	harness.Eventually(s.t, within, "all values to be under "+s.kms.KeyID(), func() error {
		out, code := s.Run("status", "--config", config, "--output", "json")
		// of the values, and of the KMS
		if code != 0 || strings.Count(out, `"keyID": "`+s.kms.KeyID()+`"`) != 2 {
			return fmt.Errorf("exit code %d: %s", code, out)
		}
		return nil
	})
}

// TestWatch checks that reencrypt --watch re-encrypts at its start and after each rotation, lets
// another run in between, and exits with 0 after a signal.
func TestWatch(t *testing.T) {
	t.Parallel()
	s, _ := newSite(t, harness.EtcdConfig{})
	values := s.fill(30)
	config := s.config("run", s.cfg)
	p := s.Spawn("watch", "reencrypt", "--config", config, "--watch")
	s.underKey(config)
	s.kms.Rotate()
	s.underKey(config)
	if r, out := s.reencrypt(config, 0, "--no-wait"); r.Rewritten != 0 {
		t.Errorf("beside it: %s", out)
	}
	if !p.Stop(within) || p.Wait(within) != 0 {
		t.Errorf("it did not end well: %s", p.Log())
	}
	if n := strings.Count(p.Log(), "30 rewritten"); n != 2 {
		t.Errorf("it told of %d runs: %s", n, p.Log())
	}
	s.sealed(values, 3)
}

// TestServe checks that of two proxies with serve --reencrypt one re-encrypts after each rotation,
// the other one takes over when it stops, and neither re-encrypts while a proxy has other rules.
func TestServe(t *testing.T) {
	t.Parallel()
	s, _ := newSite(t, harness.EtcdConfig{})
	values := s.fill(30)
	var proxies []*harness.Proxy
	for _, name := range []string{"a", "b"} {
		c := s.cfg
		c.Audit = &harness.Audit{Path: filepath.Join(s.Dir, name+"-audit.log")}
		p := s.NewProxy(name, c)
		p.Args = []string{"--reencrypt", "--reencrypt-interval", "1h", "--reencrypt-rate", "1000"}
		p.Start()
		p.WaitReady(within)
		harness.Eventually(t, within, name+" to be announced", func() error {
			if out, _ := s.Run("status", "--config", p.ConfigFile); strings.Count(out, "as here") != len(proxies)+1 {
				return fmt.Errorf("%s", out)
			}
			return nil
		})
		proxies = append(proxies, p)
	}
	config := proxies[0].ConfigFile
	s.underKey(config)
	s.kms.Rotate()
	s.underKey(config)
	if m := proxies[0].Scrape(); !strings.Contains(m, "etcd_kms_proxy_reencrypted_values_total 60\n") || !strings.Contains(m, "etcd_kms_proxy_reencrypt_left_values 0\n") {
		t.Error("the metrics of the first proxy do not tell of 60 values")
	}
	if m := proxies[1].Scrape(); !strings.Contains(m, "etcd_kms_proxy_reencrypted_values_total 0\n") {
		t.Error("the second proxy re-encrypted too")
	}
	s.sealed(values, 3)
	proxies[0].Stop(within)
	s.kms.Rotate()
	s.underKey(config)
	s.sealed(values, 4)
	s.opens(proxies[1], values)
	for name, n := range map[string]int{"a": 2, "b": 1} {
		log, err := os.ReadFile(filepath.Join(s.Dir, name+"-audit.log"))
		if err != nil {
			t.Fatal(err)
		}
		for _, outcome := range []string{"begun", "ok"} {
			if got := strings.Count(string(log), `"command":"serve --reencrypt","outcome":"`+outcome+`"`) + strings.Count(string(log), `"command":"serve --reencrypt","keys":30,"outcome":"`+outcome+`"`); got != n {
				t.Errorf("the audit log of %s has %q %d times, want %d", name, outcome, got, n)
			}
		}
	}

	other := s.cfg
	other.Rules = append(other.Rules, harness.Rule{Prefix: "/more/", WriteWith: "dev", AllowPlaintextReads: new(true)})
	other.Audit = &harness.Audit{Path: filepath.Join(s.Dir, "c-audit.log")}
	c := s.StartProxy("c", other)
	c.WaitReady(within)
	harness.Eventually(t, within, "c to be announced", func() error {
		if out, _ := s.Run("status", "--config", config); strings.Count(out, "NOT as in this configuration") != 1 {
			return fmt.Errorf("%s", out)
		}
		return nil
	})
	s.kms.Rotate()
	waitOutput(t, proxies[1].Process, "proxies have other rules")
	s.sealed(values, 4)
}
