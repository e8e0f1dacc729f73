// Package coordination tests the coordination of proxies in front of one etcd: the guard of their
// rules, their announcements, and the watch for plaintext that is written to etcd directly.
package coordination

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	prefix    = "/sealed/"
	agreement = "/etcd-kms-proxy/agreement"
	within    = 30 * time.Second
)

// site is an etcd and the configuration of a proxy in front of it.
type site struct {
	*harness.Env
	etcd *harness.Etcd
	kv   pb.KVClient // directly to etcd
	cfg  harness.ProxyConfig
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{Env: harness.New(t)}
	s.etcd = s.StartEtcd(harness.EtcdConfig{})
	s.before(t, s.etcd.Address)
	return s
}

// before connects the site's configuration and client to an etcd, or to a member of one.
func (s *site) before(t *testing.T, address string) {
	t.Helper()
	s.kv = pb.NewKVClient(harness.Dial(t, address, nil))
	s.cfg = harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: []string{"http://" + address}}, KMS: []harness.KMSConfig{s.LocalKey("dev", 1), s.LocalKey("other", 2)},
		Rules: []harness.Rule{{Prefix: prefix, WriteWith: "dev", AllowPlaintextReads: new(true)}},
	}
}

// with returns the configuration with other rules.
func (s *site) with(rules ...harness.Rule) harness.ProxyConfig {
	c := s.cfg
	c.Rules = rules
	return c
}

func (s *site) get(t *testing.T, key string) string {
	t.Helper()
	r, err := s.kv.Range(t.Context(), &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		t.Fatal(err)
	}
	if len(r.Kvs) == 0 {
		return ""
	}
	return string(r.Kvs[0].Value)
}

// agreed waits for the record of a set of rules.
func (s *site) agreed(t *testing.T, part string) {
	t.Helper()
	harness.Eventually(t, within, "the record of the rules", func() error {
		if got := s.get(t, agreement); !strings.Contains(got, part) {
			return fmt.Errorf("it is %q", got)
		}
		return nil
	})
}

// refused starts a proxy that must not serve, and returns its output.
func (s *site) refused(t *testing.T, name string, cfg harness.ProxyConfig, why ...string) string {
	t.Helper()
	p := s.NewProxy(name, cfg)
	out, code := s.Run("serve", "--config", p.ConfigFile)
	for _, w := range append(why, "hint: restore the ") {
		if !strings.Contains(out, w) {
			t.Errorf("%s does not say %q: %s", name, w, out)
		}
	}
	if code != 3 {
		t.Errorf("%s: exit code %d, want 3", name, code)
	}
	return out
}

// TestGuard checks that a proxy with rules that protect less than the agreement does not start, and
// that rules that protect more are accepted and become the agreement.
func TestGuard(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	sealed := s.cfg.Rules[0]
	first := s.StartProxy("first", s.cfg)
	first.WaitReady(within)
	s.agreed(t, `"prefix":"/sealed/"`)
	first.Stop(within)

	narrow, plain, other, strict := sealed, sealed, sealed, sealed
	narrow.Prefix, plain.WriteWith, other.WriteWith, strict.AllowPlaintextReads = prefix+"a/", "plaintext", "other", new(false)
	s.refused(t, "none", s.with(), `keys below "/sealed/" would have no rule`, "--allow-weakening")
	s.refused(t, "narrow", s.with(narrow), `keys below "/sealed/" would have no rule`)
	s.refused(t, "plain", s.with(plain), "would be written as plaintext")
	s.refused(t, "other", s.with(other), `which is not in readWith`)

	readable := other
	readable.ReadWith = []string{"dev"}
	p := s.StartProxy("readable", s.with(readable))
	p.WaitReady(within)
	s.agreed(t, `"writeWith":"other"`)
	p.Stop(within)

	strict.WriteWith, strict.ReadWith = "other", []string{"dev"}
	p = s.StartProxy("strict", s.with(strict))
	p.WaitReady(within)
	s.agreed(t, `"allowPlaintextReads":false`)
	p.Stop(within)
	s.refused(t, "loose", s.with(readable), "would allow plaintext reads", "--allow-weakening")

	// The change is intended, and recorded in the audit log.
	cfg := s.with(plain)
	cfg.Audit = &harness.Audit{Path: filepath.Join(s.Dir, "audit.jsonl")}
	p = s.NewProxy("allowed", cfg)
	out, code := s.Run("serve", "--config", p.ConfigFile)
	if code != 3 {
		t.Errorf("exit code %d: %s", code, out)
	}
	p.Args = []string{"--allow-weakening"}
	p.Start()
	s.agreed(t, `"writeWith":"plaintext"`)
	p.Stop(within)
	data, err := os.ReadFile(cfg.Audit.Path)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"event":"guard","outcome":"refused"`, `"event":"guard","outcome":"allowed"`} {
		if !strings.Contains(string(data), want) {
			t.Errorf("the audit log has no %s", want)
		}
	}
	again := s.StartProxy("again", cfg) // the record has these rules, so no flag is needed
	again.WaitReady(within)
}

// TestGuardForged checks that a change of the record without the KMS is detected.
func TestGuardForged(t *testing.T) {
	t.Parallel()
	for name, forge := range map[string]func(record map[string]any){
		"rules": func(r map[string]any) {
			r["policy"] = json.RawMessage(`{"rules":[{"prefix":"/sealed/deep/","writeWith":"dev","readWith":null,"recovery":null,"allowPlaintextReads":true}]}`)
		},
		"no proof":      func(r map[string]any) { delete(r, "proofs") },
		"another proof": func(r map[string]any) { r["proofs"] = map[string][]byte{"dev": []byte("k8s:enc:kms:v2:dev:junk")} },
		"in the clear":  func(r map[string]any) { r["proofs"] = map[string][]byte{"dev": []byte("junk")} },
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			s := newSite(t)
			p := s.StartProxy("first", s.cfg)
			p.WaitReady(within)
			s.agreed(t, prefix)
			p.Stop(within)
			var record map[string]any
			if err := json.Unmarshal([]byte(s.get(t, agreement)), &record); err != nil {
				t.Fatal(err)
			}
			forge(record)
			value, err := json.Marshal(record)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.kv.Put(t.Context(), &pb.PutRequest{Key: []byte(agreement), Value: value}); err != nil {
				t.Fatal(err)
			}
			notInvited(t, s.refused(t, "second", s.cfg, "is not genuine", "hint: restore the key file"))
		})
	}
}

// notInvited checks that the output does not suggest --allow-weakening to somebody with a wrong
// key.
func notInvited(t *testing.T, out string) {
	t.Helper()
	if strings.Contains(out, "--allow-weakening") {
		t.Errorf("it says how to get around the key: %s", out)
	}
}

// TestGuardWrongKey checks that a proxy with another key file for the same provider does not serve,
// that its hint names the key file first, and that the right file works again.
func TestGuardWrongKey(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	p := s.StartProxy("first", s.cfg)
	p.WaitReady(within)
	s.agreed(t, prefix)
	p.Stop(within)
	path := s.cfg.KMS[0].Local.KeyFile
	right, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	wrong, err := json.Marshal(map[string]any{"keys": []map[string]any{{"id": "1", "secret": s.Sealed.Key(50)}}})
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, wrong, 0o600); err != nil {
		t.Fatal(err)
	}
	notInvited(t, s.refused(t, "wrong", s.cfg, `the proof by KMS provider "dev" does not hold`, "hint: restore the key file, or the KMS key, that the values were encrypted with"))
	if err := os.WriteFile(path, right, 0o600); err != nil {
		t.Fatal(err)
	}
	p.Start()
	p.WaitReady(within)
}

// TestGuardWithoutKMS checks that without a KMS the record is still compared, and that keys without
// a rule are served.
func TestGuardWithoutKMS(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	kms := s.NewKMS("kms")
	kms.Start()
	s.cfg.KMS = append(s.cfg.KMS, kms.Config("plugin"))
	s.cfg.Rules[0].WriteWith = "plugin"
	p := s.StartProxy("first", s.cfg)
	p.WaitReady(within)
	s.agreed(t, `"writeWith":"plugin"`)
	p.Stop(within)
	kms.Stop()
	s.refused(t, "none", s.with(), "would have no rule", "--allow-weakening")
	p.Start()
	kv := pb.NewKVClient(harness.Dial(t, p.Address, nil))
	harness.Eventually(t, within, "keys without a rule to be served", func() error {
		_, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte("/clear/a"), Value: []byte("v")})
		return err
	})
	kms.Start()
	p.WaitReady(within)
}

// TestNothingBeforeTheGuard checks that the proxy serves nothing while etcd does not answer,
// because there is no record to compare with, and everything afterwards.
func TestNothingBeforeTheGuard(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.etcd.Stop(within)
	p := s.StartProxy("proxy", s.cfg)
	kv := pb.NewKVClient(harness.Dial(t, p.Address, nil))
	if _, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte("/clear/a")}); status.Code(err) != codes.Unavailable {
		t.Errorf("without etcd: %v", err)
	}
	s.etcd.Start()
	p.WaitReady(within)
	if _, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte("/clear/a")}); err != nil {
		t.Error(err)
	}
}

// TestMembers checks that status lists the proxies and reports one with other rules, and that there
// is no new agreement while they differ.
func TestMembers(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	a := s.StartProxy("a", s.cfg)
	a.WaitReady(within)
	s.agreed(t, prefix)
	type report struct {
		OK      bool
		Proxies []struct {
			ID        string
			SameRules bool
		}
	}
	look := func(config string, code, proxies, same int) {
		t.Helper()
		harness.Eventually(t, within, "the report", func() error {
			out, got := s.Run("status", "--config", config, "--output", "json")
			var r report
			if err := json.Unmarshal([]byte(out), &r); err != nil {
				return err
			}
			n := 0
			for _, p := range r.Proxies {
				if p.SameRules {
					n++
				}
			}
			if got != code || r.OK != (code == 0) || len(r.Proxies) != proxies || n != same {
				return fmt.Errorf("exit code %d: %s", got, out)
			}
			return nil
		})
	}
	look(a.ConfigFile, 0, 1, 1)
	more := harness.Rule{Prefix: "/more/", WriteWith: "dev", AllowPlaintextReads: new(true)}
	b := s.StartProxy("b", s.with(s.cfg.Rules[0], more))
	b.WaitReady(within)
	look(a.ConfigFile, 1, 2, 1)
	look(b.ConfigFile, 1, 2, 1)
	if got := s.get(t, agreement); strings.Contains(got, "/more/") {
		t.Errorf("agreed on what one of two has: %s", got)
	}
	a.Stop(within) // deletes its announcement
	s.agreed(t, "/more/")
	look(b.ConfigFile, 0, 1, 1)

	// Deleting the announcement must not keep the proxy from announcing itself.
	if _, err := s.kv.DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte("/etcd-kms-proxy/"), RangeEnd: []byte("/etcd-kms-proxy0")}); err != nil {
		t.Fatal(err)
	}
	look(b.ConfigFile, 0, 1, 1)
	s.agreed(t, "/more/")
}

// TestOwnKeys checks that clients can read the proxies' own keys, and cannot write them.
func TestOwnKeys(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	p := s.StartProxy("proxy", s.with(harness.Rule{Prefix: "", WriteWith: "dev", AllowPlaintextReads: new(false)}))
	p.WaitReady(within)
	s.agreed(t, "dev")
	kv := pb.NewKVClient(harness.Dial(t, p.Address, nil))
	all, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
	if err != nil || all.Count != 2 {
		t.Errorf("a list of all keys: %v, %v", all, err)
	}
	if _, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte(agreement), Value: []byte("{}")}); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a put: %v", err)
	}
	if out, code := s.Run("status", "--config", p.ConfigFile); code != 0 {
		t.Errorf("status counts them: %s", out)
	}
}

// TestBypass checks that plaintext written to etcd directly is counted, audited once per key, and
// logged. Writes through the proxy and keys without a rule that encrypts must not count.
func TestBypass(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.cfg.Audit = &harness.Audit{Path: filepath.Join(s.Dir, "audit.jsonl")}
	p := s.StartProxy("proxy", s.cfg)
	p.WaitReady(within)
	through := pb.NewKVClient(harness.Dial(t, p.Address, nil))
	put := func(kv pb.KVClient, key string) {
		t.Helper()
		if _, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte(key), Value: []byte(s.Sealed.Value(key))}); err != nil {
			t.Fatal(err)
		}
	}
	// the plaintext written to etcd is in its files, so it is not in the set of encrypted values
	s.Clear.Value("past")
	past := func(key string) {
		t.Helper()
		if _, err := s.kv.Put(t.Context(), &pb.PutRequest{Key: []byte(key), Value: []byte("in the clear")}); err != nil {
			t.Fatal(err)
		}
	}
	put(through, prefix+"good")
	past("/clear/a")
	for range 3 {
		past(prefix + "bad")
	}
	past(prefix + "bad2")
	harness.Eventually(t, within, "four writes to be seen", func() error {
		if m := p.Scrape(); !strings.Contains(m, `etcd_kms_proxy_plaintext_writes_seen_total{rule="/sealed/"} 4`) {
			return fmt.Errorf("the metric does not say so")
		}
		return nil
	})
	if r := p.Report(); !strings.Contains(r, "[-]bypass: a value was written in plaintext") || !strings.HasPrefix(r, "200") {
		t.Errorf("readyz: %s", r)
	}
	p.Stop(within)
	data, err := os.ReadFile(s.cfg.Audit.Path)
	if err != nil {
		t.Fatal(err)
	}
	if n := strings.Count(string(data), `"event":"bypass"`); n != 2 {
		t.Errorf("%d records of two keys", n)
	}
	if n := strings.Count(p.Log(), "a value was written in plaintext to etcd directly"); n != 1 {
		t.Errorf("%d log lines in a minute", n)
	}
}

// TestScan checks that with --scan-interval one of two proxies exports the figures, and the other
// one takes over when it stops.
func TestScan(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	var proxies []*harness.Proxy
	for _, name := range []string{"a", "b"} {
		p := s.NewProxy(name, s.cfg)
		p.Args = []string{"--scan-interval", "1s"}
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
	kv := pb.NewKVClient(harness.Dial(t, proxies[0].Address, nil))
	if _, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte(prefix + "a"), Value: []byte(s.Sealed.Value("a"))}); err != nil {
		t.Fatal(err)
	}
	lines := []string{
		`etcd_kms_proxy_stored_values{rule="/sealed/",state="current"} 1`, `etcd_kms_proxy_stored_key_values{key_id="1",provider="dev",rule="/sealed/",state="current"} 1`,
		`etcd_kms_proxy_stored_key_bytes{key_id="1",provider="dev",rule="/sealed/",state="current"} `, `etcd_kms_proxy_stored_oldest_revision{rule="/sealed/",state="current"} `,
		`etcd_kms_proxy_stored_newest_revision{rule="/sealed/",state="current"} `,
	}
	shows := func(p *harness.Proxy) {
		t.Helper()
		harness.Eventually(t, within, "the figures", func() error {
			m := p.Scrape()
			for _, line := range lines {
				if !strings.Contains(m, line) {
					return fmt.Errorf("no line %s", line)
				}
			}
			return nil
		})
	}
	shows(proxies[0])
	if strings.Contains(proxies[1].Scrape(), "etcd_kms_proxy_stored_values{") {
		t.Error("both proxies show the figures")
	}
	proxies[0].Stop(within)
	shows(proxies[1])
}

// TestJobs checks that a proxy without the flags of the jobs does not keep a younger one from them:
// the younger proxy counts the values and re-encrypts.
func TestJobs(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	var proxies []*harness.Proxy
	for i, args := range [][]string{nil, {"--scan-interval", "1s", "--reencrypt", "--reencrypt-interval", "2s"}} {
		name := fmt.Sprintf("proxy-%d", i)
		p := s.NewProxy(name, s.cfg)
		p.Args = args
		p.Start()
		p.WaitReady(within)
		harness.Eventually(t, within, name+" to be announced", func() error {
			if out, _ := s.Run("status", "--config", p.ConfigFile); strings.Count(out, "as here") != i+1 {
				return fmt.Errorf("%s", out)
			}
			return nil
		})
		proxies = append(proxies, p)
	}
	older, younger := proxies[0], proxies[1]
	const key = prefix + "a"
	if _, err := s.kv.Put(t.Context(), &pb.PutRequest{Key: []byte(key), Value: []byte("in the clear")}); err != nil {
		t.Fatal(err)
	}
	harness.Eventually(t, within, "the younger proxy to do the jobs", func() error {
		m := younger.Scrape()
		for _, line := range []string{"etcd_kms_proxy_reencrypted_values_total 1\n", `etcd_kms_proxy_stored_values{rule="/sealed/",state="current"} 1`} {
			if !strings.Contains(m, line) {
				return fmt.Errorf("no line %s", line)
			}
		}
		return nil
	})
	if got := s.get(t, key); !strings.HasPrefix(got, "k8s:enc:kms:v2:dev:") {
		t.Error("the value is not encrypted")
	}
	if strings.Contains(older.Scrape(), "etcd_kms_proxy_stored_values{") {
		t.Error("the older proxy shows figures, and has no --scan-interval")
	}
}
