// Package lifecycle tests the commands that connect to etcd directly: status, verify, purge and
// decrypt, with real etcd and real processes. reencrypt has its own package.
package lifecycle

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	prefix = "/registry/secrets/"
	within = 30 * time.Second
	// mark is in every value that is stored in plaintext here, on purpose.
	mark = "plaintext-mark"
)

// site is an etcd with a proxy in front of it.
type site struct {
	*harness.Env
	etcd  *harness.Etcd
	proxy *harness.Proxy
	raw   pb.KVClient // directly to etcd
	kv    pb.KVClient // through the proxy
	audit string
}

func newSite(t *testing.T, version string, change func(*harness.ProxyConfig)) *site {
	t.Helper()
	s := &site{Env: harness.New(t)}
	s.etcd = s.StartEtcd(harness.EtcdConfig{Version: version})
	cfg := harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: []string{s.etcd.URL}}, KMS: []harness.KMSConfig{s.LocalKey("dev", 1)},
		Rules: []harness.Rule{{Prefix: prefix, WriteWith: "dev"}}, Audit: &harness.Audit{Path: filepath.Join(s.Dir, "audit.jsonl")},
	}
	if change != nil {
		change(&cfg)
	}
	s.audit = filepath.Join(s.Dir, "audit.commands.jsonl")
	s.proxy = s.StartProxy("proxy", cfg)
	s.proxy.WaitReady(within)
	s.raw = pb.NewKVClient(harness.Dial(t, s.etcd.Address, nil))
	s.kv = pb.NewKVClient(harness.Dial(t, s.proxy.Address, nil))
	return s
}

func put(t *testing.T, kv pb.KVClient, key, value string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	if _, err := kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value)}); err != nil {
		t.Fatalf("put %s: %v", key, err)
	}
}

// run runs a command with the proxy's configuration and checks its exit code and output.
func (s *site) run(t *testing.T, code int, command string, wants ...string) string {
	t.Helper()
	args := append(strings.Fields(command), "--config", s.proxy.ConfigFile)
	out, got := s.Run(args...)
	if got != code {
		t.Errorf("%s: exit code %d, want %d\n%s", command, got, code, out)
	}
	for _, w := range wants {
		if !strings.Contains(out, w) {
			t.Errorf("%s does not print %q:\n%s", command, w, out)
		}
	}
	return out
}

// files returns the files below the data directory that contain what, found by grep.
func files(t *testing.T, dir, what string) []string {
	t.Helper()
	var found []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		data, err := os.ReadFile(path)
		if err == nil && bytes.Contains(data, []byte(what)) {
			rel, _ := filepath.Rel(dir, path)
			found = append(found, rel)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// verified is the output of verify with --output json.
type verified struct {
	OK          bool
	Findings    int
	Undecrypted int
	// NotChecked is what verify reports as not searched.
	NotChecked []string
	List       []struct {
		File, Place, Key, Why string
	}
}

func (s *site) verify(t *testing.T, code int, flags string) (v verified, places map[string]bool) {
	t.Helper()
	out := s.run(t, code, "verify --output json "+flags)
	_, report, _ := strings.Cut(out, "{\n") // log lines may precede it, and an error may follow
	if err := json.NewDecoder(strings.NewReader("{" + report)).Decode(&v); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if v.OK != (code == 0) || (v.Findings > 0) != (code == 1) {
		t.Errorf("ok %v with %d findings and exit code %d", v.OK, v.Findings, code)
	}
	places = make(map[string]bool)
	for _, f := range v.List {
		kind := filepath.Base(filepath.Dir(f.File))
		places[strings.Join(strings.Fields(kind+" "+f.Place+" "+f.Key), " ")] = true
	}
	if strings.Contains(out, mark+"-") {
		t.Error("verify prints a value")
	}
	return v, places
}

func needs(t *testing.T, places map[string]bool, wants ...string) {
	t.Helper()
	for _, w := range wants {
		if !places[w] {
			t.Errorf("no finding %q among %v", w, places)
		}
	}
}

// TestVerifyIsNotFooled puts plaintext in every place of etcd that can hold it, follows it through
// re-encryption and purge, and checks the result with grep.
func TestVerifyIsNotFooled(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"3.5", "3.6", "3.7"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, version, nil)
			value := func(size int) string { return mark + "-" + strings.Repeat("x", size) }
			put(t, s.raw, prefix+"live", value(10))
			put(t, s.raw, prefix+"large", value(100<<10)) // over many pages
			put(t, s.raw, prefix+"old", value(5<<10))
			put(t, s.kv, prefix+"old", "sealed now")
			put(t, s.raw, prefix+"deleted", value(10))
			put(t, s.raw, prefix+"marker", "k8s:enc:kms:v2:dev:"+mark+"-junk")
			nested := &pb.TxnRequest{Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{
				Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(prefix + "nested"), Value: []byte(value(10))}}}},
			}}}}}
			if _, err := s.raw.Txn(t.Context(), nested); err != nil {
				t.Fatal(err)
			}
			// An encrypted value that was copied to another key: well-formed, but it does not
			// decrypt.
			r, err := s.raw.Range(t.Context(), &pb.RangeRequest{Key: []byte(prefix + "old")})
			if err != nil {
				t.Fatal(err)
			}
			put(t, s.raw, prefix+"moved", string(r.Kvs[0].Value))
			put(t, s.raw, "/clear/not-ruled", value(10))
			if _, err := s.raw.DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte(prefix + "deleted")}); err != nil {
				t.Fatal(err)
			}

			_, places := s.verify(t, 1, "")
			needs(t, places, ". live "+prefix+"live", ". live "+prefix+"large", ". live "+prefix+"nested", ". live "+prefix+"marker", ". live "+prefix+"moved",
				". history "+prefix+"old", ". history "+prefix+"deleted")
			s.run(t, 3, "verify --data-dir "+s.etcd.DataDir, "a running etcd has locked the file")
			s.run(t, 3, "purge --yes", "run status to see which")

			s.etcd.Stop(within)
			_, places = s.verify(t, 1, "--data-dir "+s.etcd.DataDir+" --canary "+mark)
			for _, key := range []string{"live", "large", "nested", "marker", "old", "deleted", "moved"} {
				needs(t, places, "wal log "+prefix+key)
			}
			needs(t, places, "snap live "+prefix+"live", "snap live "+prefix+"large", "snap live "+prefix+"marker", "snap live "+prefix+"moved", "snap history "+prefix+"old",
				"snap history "+prefix+"deleted", "snap canary", "wal canary")
			for place := range places {
				if strings.Contains(place, "not-ruled") {
					t.Errorf("a key without a rule is a finding: %s", place)
				}
			}
			if _, offline := s.verify(t, 1, "--offline --data-dir "+s.etcd.DataDir); offline["snap live "+prefix+"moved"] || !offline["snap live "+prefix+"marker"] {
				t.Errorf("without a KMS: %v", offline)
			}

			// What cannot be decrypted is deleted, the rest re-encrypted. Compaction alone leaves
			// freed pages.
			s.etcd.Start()
			for _, key := range []string{prefix + "marker", prefix + "moved", "/clear/not-ruled"} {
				if _, err := s.raw.DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte(key)}); err != nil {
					t.Fatal(err)
				}
			}
			s.run(t, 0, "reencrypt")
			now, err := s.raw.Range(t.Context(), &pb.RangeRequest{Key: []byte("none")})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.raw.Compact(t.Context(), &pb.CompactionRequest{Revision: now.Header.Revision, Physical: true}); err != nil {
				t.Fatal(err)
			}
			s.verify(t, 0, "")
			s.etcd.Stop(within)
			v, places := s.verify(t, 1, "--data-dir "+s.etcd.DataDir)
			remains := 0
			for _, f := range v.List {
				if f.Place == "remains" && strings.HasSuffix(f.File, "db") {
					remains++
				}
				if f.Place == "live" || f.Place == "history" {
					t.Errorf("%+v is in the database still", f)
				}
			}
			if remains == 0 {
				t.Errorf("no remains in freed pages: %v", places)
			}
			if found := files(t, s.etcd.DataDir, mark); len(found) != 2 {
				t.Errorf("grep finds it in %v", found)
			}

			s.etcd.Start()
			s.run(t, 1, "purge --yes", "left to do", "write-ahead logs")
			s.etcd.Stop(within)
			v, _ = s.verify(t, 1, "--data-dir "+s.etcd.DataDir+" --canary "+mark)
			for _, f := range v.List {
				if !strings.HasSuffix(f.File, ".wal") {
					t.Errorf("after a purge: %+v", f)
				}
			}
			for _, name := range files(t, s.etcd.DataDir, mark) {
				if !strings.HasSuffix(name, ".wal") {
					t.Errorf("after a purge grep finds it in %s", name)
				}
			}
			// When its write-ahead logs are removed, all plaintext is gone. A data directory
			// without them is not accepted as a member's.
			if err := os.Rename(filepath.Join(s.etcd.DataDir, "member", "wal"), filepath.Join(s.Dir, "wal-away")); err != nil {
				t.Fatal(err)
			}
			s.run(t, 3, "verify --data-dir "+s.etcd.DataDir, "holds no write-ahead log")
			s.verify(t, 0, "--snapshot "+filepath.Join(s.etcd.DataDir, "member", "snap", "db")+" --canary "+mark)
			if err := os.Rename(filepath.Join(s.Dir, "wal-away"), filepath.Join(s.etcd.DataDir, "member", "wal")); err != nil {
				t.Fatal(err)
			}
			s.etcd.Start()
		})
	}
}

// TestNoHistory checks that verify does not wait for history on an etcd that was compacted at its
// current revision and that nobody writes to.
func TestNoHistory(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"3.5", "3.7"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			s := newSite(t, version, nil)
			put(t, s.kv, prefix+"key", "value")
			s.proxy.Stop(within)
			r, err := s.raw.Range(t.Context(), &pb.RangeRequest{Key: []byte("none")})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := s.raw.Compact(t.Context(), &pb.CompactionRequest{Revision: r.Header.Revision, Physical: true}); err != nil {
				t.Fatal(err)
			}
			s.verify(t, 0, "")
			s.run(t, 0, "purge --dry-run", "")
		})
	}
}

// TestOldEtcd checks that versions with unreliable watches are refused, and not reported as without
// history. Their files are searched nevertheless.
func TestOldEtcd(t *testing.T) {
	t.Parallel()
	if _, err := os.Stat(filepath.Join(filepath.Dir(harness.Bin(t, "etcd-3.5")), "etcd-3.4")); err != nil {
		t.Skip("there is no etcd 3.4: make tools-etcd-3.4 takes it from a package of Debian 12")
	}
	s := newSite(t, "3.4", nil)
	put(t, s.raw, prefix+"a", mark+"-a")
	put(t, s.kv, prefix+"a", "sealed")
	for _, command := range []string{"verify", "purge --yes", "purge --dry-run"} {
		s.run(t, 3, command, "3.4.31")
	}
	s.etcd.Stop(within)
	_, places := s.verify(t, 1, "--data-dir "+s.etcd.DataDir)
	needs(t, places, "wal log "+prefix+"a", "snap history "+prefix+"a")
}

// TestStatus counts one value of every state, under the rule with the longest prefix.
func TestStatus(t *testing.T) {
	t.Parallel()
	s := newSite(t, "3.7", func(c *harness.ProxyConfig) {
		kms := c.KMS[0]
		c.Rules = append(c.Rules, harness.Rule{Prefix: prefix + "deep/", WriteWith: "plaintext", ReadWith: []string{kms.Name}})
	})
	put(t, s.kv, prefix+"current", "v")
	put(t, s.raw, prefix+"plain", "v")
	put(t, s.raw, prefix+"foreign", "k8s:enc:kms:v2:other:x")
	put(t, s.raw, prefix+"broken", "k8s:enc:kms:v2:dev:x")
	put(t, s.raw, prefix+"deep/plain", "v")
	look := func(code int, flags string, want ...int64) map[string]any {
		t.Helper()
		out := s.run(t, code, "status --output json "+flags)
		var report map[string]any
		var typed struct {
			Rules []struct {
				Prefix                                                  string
				Keys, Current, Stale, Plaintext, Foreign, Undecryptable int64
			}
		}
		if err := json.Unmarshal([]byte(out), &report); err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal([]byte(out), &typed); err != nil {
			t.Fatal(err)
		}
		r, deep := typed.Rules[0], typed.Rules[1]
		if got := fmt.Sprint([]int64{r.Keys, r.Current, r.Stale, r.Plaintext, r.Foreign, r.Undecryptable}); got != fmt.Sprint(want) {
			t.Errorf("%s counts %v, want %v", r.Prefix, got, want)
		}
		if deep.Keys != 1 || deep.Current != 1 {
			t.Errorf("%s counts %+v", deep.Prefix, deep)
		}
		return report
	}
	report := look(1, "--list", 4, 1, 0, 1, 1, 1)
	if keys, ok := report["keys"].([]any); !ok || len(keys) != 3 {
		t.Errorf("listed: %v", report["keys"])
	}
	out := strings.Join(strings.Fields(s.run(t, 1, "status")), " ")
	for state, by := range map[string]string{"current": "dev 1", "plaintext": "none none", "foreign": "other none", "undecryptable": "dev none"} {
		row := regexp.MustCompile(`"` + prefix + `" ` + state + " " + by + ` 1 \d+ B \d+ to \d+`)
		if !row.MatchString(out) {
			t.Errorf("no row %s in %s", row, out)
		}
	}
	s.LocalKey("dev", 2) // the same file, with one more version
	look(1, "", 4, 0, 1, 1, 1, 1)
	for _, key := range []string{"foreign", "broken"} {
		if _, err := s.raw.DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte(prefix + key)}); err != nil {
			t.Fatal(err)
		}
	}
	s.run(t, 0, "reencrypt")
	look(0, "", 2, 2, 0, 0, 0, 0)
	s.etcd.Stop(within)
	s.run(t, 3, "status --timeout 1s", "etcd is unreachable")
	s.etcd.Start()
}

// TestPurgeOfACluster purges three members, the leader last, and refuses to when one of them is
// down.
func TestPurgeOfACluster(t *testing.T) {
	t.Parallel()
	env := harness.New(t)
	cluster := env.StartCluster(3, harness.EtcdConfig{Bare: true})
	p := env.StartProxy("proxy", harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: cluster.URLs()}, KMS: []harness.KMSConfig{env.LocalKey("dev", 1)}, Rules: []harness.Rule{{Prefix: prefix, WriteWith: "dev"}},
	})
	p.WaitReady(within)
	s := &site{Env: env, proxy: p}
	raw := pb.NewKVClient(harness.Dial(t, cluster.Members[0].Address, nil))
	for i := range 200 {
		put(t, raw, fmt.Sprintf("%ss%d", prefix, i), mark+"-"+strings.Repeat("x", 2000))
	}
	s.run(t, 0, "reencrypt")
	s.run(t, 2, "purge", "--yes continues without confirmation")
	s.run(t, 0, "purge --dry-run", "200 plaintext values", "nothing was changed")
	down := cluster.Members[1]
	if down == cluster.Leader() {
		down = cluster.Members[2]
	}
	down.Stop(within)
	s.run(t, 3, "purge --yes", "cannot be reached")
	down.Start()
	out := s.run(t, 1, "purge --yes", "200 old plaintext values removed")
	plan := out[:strings.Index(out, "old plaintext values removed")]
	if first, last := strings.Index(plan, "the leader"), strings.LastIndex(plan, "it is defragmented, and does not respond meanwhile"); first < 0 || strings.Count(plan[first:last], "member ") != 0 {
		t.Errorf("the leader is not the last one:\n%s", plan)
	}
	s.run(t, 0, "verify")
	for _, m := range cluster.Members {
		m.Stop(within)
		for _, name := range files(t, m.DataDir, mark) {
			if !strings.HasSuffix(name, ".wal") {
				t.Errorf("%s of %s holds it still", name, m.DataDir)
			}
		}
	}
}

// TestDecrypt decrypts values in an emergency, and never without an audit record.
func TestDecrypt(t *testing.T) {
	t.Parallel()
	s := newSite(t, "3.7", nil)
	put(t, s.kv, prefix+"a", "value of a")
	put(t, s.kv, prefix+"b", "value of b")
	put(t, s.raw, prefix+"broken", "k8s:enc:kms:v2:dev:x")
	if out := s.run(t, 0, "decrypt --yes "+prefix+"a"); out != "value of a" {
		t.Errorf("%q", out)
	}
	out := s.run(t, 1, "decrypt --yes --prefix "+prefix, `"dmFsdWUgb2YgYQ=="`, `"dmFsdWUgb2YgYg=="`, "malformed")
	if n := strings.Count(out, "\n"); n != 3 {
		t.Errorf("%d lines: %s", n, out)
	}
	s.run(t, 2, "decrypt "+prefix+"a", "no terminal")
	s.run(t, 3, "decrypt --yes "+prefix+"broken", "cannot be decrypted")
	s.run(t, 3, "decrypt --yes "+prefix+"none", "there is no key")
	file := filepath.Join(s.Dir, "out")
	s.run(t, 0, "decrypt --yes --output-file "+file+" "+prefix+"a")
	info, err := os.Stat(file)
	if data, rerr := os.ReadFile(file); err != nil || rerr != nil || string(data) != "value of a" || info.Mode().Perm() != 0o600 {
		t.Errorf("%q, %v, %v, %v", data, info, err, rerr)
	}
	s.run(t, 3, "decrypt --yes --output-file "+file+" "+prefix+"b", "file exists")
	if data, err := os.ReadFile(file); err != nil || string(data) != "value of a" {
		t.Errorf("the file that was there: %q, %v", data, err)
	}
	// Values of other providers are not decrypted, and a failure leaves no file that would prevent
	// the next attempt.
	other := filepath.Join(s.Dir, "other")
	for key, want := range map[string]string{prefix + "foreign": "that its rule does not read", "/clear/sealed": "no rule covers its key"} {
		put(t, s.raw, key, "k8s:enc:kms:v2:other:junk")
		for _, flags := range []string{"", "--output json "} {
			if out := s.run(t, 1, "decrypt --yes "+flags+key, want); strings.Contains(out, "junk") || strings.Contains(out, `"value"`) {
				t.Errorf("%s is handed out: %s", key, out)
			}
		}
		for range 2 {
			s.run(t, 1, "decrypt --yes --output-file "+other+" "+key, want)
		}
		if _, err := s.raw.DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte(key)}); err != nil {
			t.Fatal(err)
		}
	}
	s.run(t, 3, "decrypt --yes --output-file "+other+" "+prefix+"none", "there is no key")
	s.run(t, 0, "decrypt --yes --output-file "+other+" "+prefix+"a")
	// A stopped member's database is a snapshot too.
	s.etcd.Stop(within)
	if out := s.run(t, 0, "decrypt --yes --snapshot "+filepath.Join(s.etcd.DataDir, "member", "snap", "db")+" "+prefix+"b"); out != "value of b" {
		t.Errorf("%q", out)
	}
	s.etcd.Start()

	data, err := os.ReadFile(s.audit)
	if err != nil {
		t.Fatal(err)
	}
	begun, ok := strings.Count(string(data), `"command":"decrypt"`), strings.Count(string(data), `"outcome":"ok"`)
	if begun < 14 || ok != 4 || bytes.Contains(data, []byte("value of")) {
		t.Errorf("%d records of decrypt, %d ok:\n%s", begun, ok, data)
	}
	if db := filepath.Join(s.etcd.DataDir, "member", "snap", "db"); !bytes.Contains(data, []byte(`"reason":"from etcd"`)) || !bytes.Contains(data, []byte(`"reason":"from `+db)) {
		t.Errorf("it is not recorded where values were from:\n%s", data)
	}
	if !bytes.Contains(data, []byte(`"event":"kms","provider":"dev","operation":"Decrypt"`)) {
		t.Errorf("no call of the KMS in\n%s", data)
	}
	// Without an audit log, or with one that cannot be written, nothing is decrypted.
	c := s.proxy.Config
	c.Audit = nil
	s.proxy = s.NewProxy("unaudited", c)
	s.run(t, 2, "decrypt --yes "+prefix+"a", "there is no audit log")
	s.run(t, 0, "decrypt --yes --audit-file "+filepath.Join(s.Dir, "own.jsonl")+" "+prefix+"a")
	if out := s.run(t, 3, "decrypt --yes --audit-file "+filepath.Join(s.Dir, "none", "x.jsonl")+" "+prefix+"a"); strings.Contains(out, "value of") {
		t.Error("opened without a record")
	}
}
