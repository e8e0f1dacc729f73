package recovery

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestKeyIsDeleted deletes a cloud key: everything can be read, nothing can be written, the rule
// moves to a new key, and a backup from that time can be read with only the recovery key.
func TestKeyIsDeleted(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	double := s.env.NewAlibaba()
	ack, dr, fresh := s.env.AlibabaKey("ack", double), s.env.LocalKey("dr", 1), s.env.LocalKey("new", 2)
	s.run(t, harness.Rule{WriteWith: "ack", Recovery: []string{"dr"}, RecoveryRequired: true}, ack, dr)
	s.proxy.WaitReady(within)
	s.fill(t, "one", 20)
	double.Rotate(kmsdouble.DefaultKeyID) // so that there are two DEK seeds
	harness.Eventually(t, within, "a seed under the new version", func() error {
		if n := double.Applied("GenerateDataKey"); n < 2 {
			return fmt.Errorf("%d seeds were generated", n)
		}
		return nil
	})
	s.fill(t, "two", 20)
	s.reads(t)
	if n := s.recoveries(t); len(n) > 0 {
		t.Errorf("all is well, and the audit log tells of %v", n)
	}

	double.RemoveKey(kmsdouble.DefaultKeyID)
	s.proxy.Stop(within)
	s.proxy.Start()
	s.reads(t)
	s.refused(t, codes.FailedPrecondition, `"ack"`, "gone", "Forbidden.KeyNotFound")
	if err := s.put(t, "/clear/a", s.env.Clear.Value("a")); err != nil {
		t.Errorf("outside of the rule: %v", err)
	}
	const uses = `etcd_kms_proxy_recovery_uses_total{provider="ack",recovery_provider="dr"} `
	s.says(t, "[-]recovery of ack by dr: in use: ", uses)
	// Each value was read twice. The proxies' own keys in etcd count too.
	_, after, _ := strings.Cut(s.proxy.Scrape(), uses)
	var n int
	if _, err := fmt.Sscan(after, &n); err != nil || n < 2*len(s.want) {
		t.Errorf("%d uses are counted, %v", n, err)
	}
	for _, check := range []string{"[-]kms ack: ", "[+]kms dr ok", "[-]rule \"/sealed/\": "} {
		if !strings.Contains(s.proxy.Report(), check) {
			t.Errorf("readyz does not say %s:\n%s", check, s.proxy.Report())
		}
	}
	if n := s.recoveries(t)["ack by dr"]; n < 2 {
		t.Errorf("two seeds were recovered, and the audit log tells of %d", n)
	}
	if log := s.proxy.Log(); !strings.Contains(log, "values are decrypted by recovery copies of their DEK seeds") {
		t.Error("the log does not say so")
	}

	// The rule gets a new key, and what is written again is encrypted with it.
	s.run(t, harness.Rule{WriteWith: "new", ReadWith: []string{"ack"}, Recovery: []string{"dr"}}, ack, dr, fresh)
	s.reads(t)
	for key, value := range s.want {
		if strings.HasPrefix(key, prefix+"one") {
			if err := s.put(t, key, value); err != nil {
				t.Fatal(err)
			}
		}
	}
	s.fill(t, "three", 5)
	s.reads(t)
	for key, want := range map[string]string{"one0": "new", "two0": "ack", "three0": "new"} {
		if provider, by := s.copies(t, prefix+key); provider != want || !slices.Equal(by, []string{"dr"}) {
			t.Errorf("%s is sealed by %s with copies by %v", key, provider, by)
		}
	}
	s.proxy.Stop(within)

	// Another cluster, with the data of a backup, and with no KMS except the recovery key.
	stored, err := all(t, s.raw)
	if err != nil {
		t.Fatal(err)
	}
	s.start(t)
	for key, value := range stored {
		if _, err := s.raw.Put(t.Context(), &pb.PutRequest{Key: []byte(key), Value: []byte(value)}); err != nil {
			t.Fatal(err)
		}
	}
	s.run(t, harness.Rule{WriteWith: "dr", ReadWith: []string{"ack", "new"}}, dr, s.unreachable("ack"), s.unreachable("new"))
	s.reads(t)
	if n := s.recoveries(t); n["new by dr"] == 0 {
		t.Errorf("the audit log tells of %v", n)
	}
	if out, code := s.env.Run("audit", "verify", s.auditPath()); code != 0 {
		t.Errorf("exit code %d: %s", code, out)
	}
}

// TestCopyIsLacking uses a recovery provider that does not wrap when DEK seeds are generated.
func TestCopyIsLacking(t *testing.T) {
	for _, required := range []bool{false, true} {
		t.Run(fmt.Sprintf("required %v", required), func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			kms := s.env.NewKMS("dr")
			s.run(t, harness.Rule{WriteWith: "dev", Recovery: []string{"dr"}, RecoveryRequired: required}, s.env.LocalKey("dev", 1), kms.Config("dr"))
			if required {
				harness.Eventually(t, within, "the first contact", func() error {
					if !strings.Contains(s.proxy.Report(), "[-]rule") {
						return fmt.Errorf("readyz says %s", s.proxy.Report())
					}
					return nil
				})
				s.refused(t, codes.Unavailable, `"dev"`, `recovery provider "dr"`)
				s.says(t, "[-]recovery of dev by dr: no value is encrypted without it: ", `etcd_kms_proxy_recovery_missing{provider="dev",recovery_provider="dr"} 1`)
				if r, err := all(t, s.raw); err != nil || len(r) > 0 {
					t.Errorf("etcd holds %d values, %v", len(r), err)
				}
			} else {
				s.fill(t, "bare", 3)
				s.says(t, "[-]recovery of dev by dr: values are encrypted without it: ", `etcd_kms_proxy_recovery_missing{provider="dev",recovery_provider="dr"} 1`)
				if log := s.proxy.Log(); strings.Count(log, "values are encrypted without a recovery copy of their DEK seed") != 1 {
					t.Error("the log does not say so once")
				}
				if _, by := s.copies(t, prefix+"bare0"); len(by) > 0 {
					t.Errorf("copies by %v", by)
				}
			}
			kms.Start()
			s.proxy.WaitReady(within)
			s.fill(t, "copied", 3)
			if _, by := s.copies(t, prefix+"copied0"); !slices.Equal(by, []string{"dr"}) {
				t.Errorf("copies by %v", by)
			}
			s.says(t, "[+]recovery of dev by dr ok", `etcd_kms_proxy_recovery_missing{provider="dev",recovery_provider="dr"} 0`)
			s.reads(t)
		})
	}
}

// TestLostBehindAPlugin loses a key behind our own KMS plugin, which reports a deleted key in a way
// that allows recovery copies.
func TestLostBehindAPlugin(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	key := s.env.LocalKey("hidden", 1)
	plugin := s.env.StartPlugin("plugin", "hidden", key)
	kms := []harness.KMSConfig{{Name: "ack", PollInterval: "1s", Plugin: &harness.PluginKMS{Endpoint: plugin.Socket}}, s.env.LocalKey("dr", 2)}
	rule := harness.Rule{WriteWith: "ack", Recovery: []string{"dr"}}
	s.run(t, rule, kms...)
	s.proxy.WaitReady(within)
	s.fill(t, "a", 5)
	// Version 1 is lost: another key has replaced it in the file.
	data, err := os.ReadFile(key.Local.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(key.Local.KeyFile, []byte(strings.Replace(string(data), `"id":"1"`, `"id":"9"`, 1)), 0o600); err != nil {
		t.Fatal(err)
	}
	s.run(t, rule, kms...)
	s.reads(t)
	s.proxy.Scrape()
	if n := s.recoveries(t)["ack by dr"]; n == 0 {
		t.Error("the audit log does not tell of it")
	}
	s.fill(t, "b", 5)
	s.reads(t)
}
