package reencrypt

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestStrictRule checks that plaintext under a strict rule is left unchanged by the proxy's own
// re-encryption, by --watch and by the command, until the operator says otherwise, and that a value
// of a provider that the rule does not read is left unchanged even then.
func TestStrictRule(t *testing.T) {
	t.Parallel()
	s, _ := newSite(t, harness.EtcdConfig{})
	s.cfg.Rules[0].AllowPlaintextReads = new(false)
	s.cfg.Audit = &harness.Audit{Path: filepath.Join(s.Dir, "audit.log")}
	p := s.NewProxy("proxy", s.cfg)
	p.Args = []string{"--reencrypt", "--reencrypt-interval", "1s"}
	p.Start()
	p.WaitReady(within)
	kv := pb.NewKVClient(harness.Dial(t, p.Address, nil))
	stale, plain, foreign := prefix+"stale", prefix+"plain", prefix+"foreign"
	if _, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte(stale), Value: []byte("genuine")}); err != nil {
		t.Fatal(err)
	}
	s.put(plain, []byte("forged"), 0)
	s.put(foreign, []byte(marker+"other:forged"), 0)
	s.kms.Rotate()
	harness.Eventually(t, within, "the proxy to rewrite the stale value and to leave two", func() error {
		if v := get(t, s.kv, stale).Version; v != 2 {
			return fmt.Errorf("the stale value has version %d", v)
		}
		if m := p.Scrape(); !strings.Contains(m, "etcd_kms_proxy_reencrypt_left_values 2\n") {
			return fmt.Errorf("not counted")
		}
		return nil
	})
	untouched := func(when string) {
		t.Helper()
		for key, want := range map[string]string{plain: "forged", foreign: marker + "other:forged"} {
			if got := get(t, s.kv, key); string(got.Value) != want || got.Version != 1 {
				t.Errorf("%s: %s is %q", when, key, got.Value)
			}
			if _, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte(key)}); status.Code(err) != codes.DataLoss {
				t.Errorf("%s: the proxy reads %s: %v", when, key, err)
			}
		}
	}
	untouched("serve --reencrypt")

	config := s.config("run", s.cfg)
	for _, flags := range [][]string{{"--dry-run"}, nil, {"--prefix", plain}} {
		r, out := s.reencrypt(config, 1, flags...)
		if r.Plaintext != 1 || r.Foreign != int64(1-len(flags)/2) || r.Rewritten != 0 || r.OK || r.Left[len(r.Left)-1].Key != plain ||
			!strings.Contains(r.Left[len(r.Left)-1].Why, "--encrypt-plaintext") {
			t.Errorf("reencrypt %q: %s", flags, out)
		}
		untouched(fmt.Sprintf("reencrypt %q", flags))
	}
	if out, code := s.Run("reencrypt", "--config", config, "--watch", "--encrypt-plaintext"); code != 2 {
		t.Errorf("--watch --encrypt-plaintext: exit code %d: %s", code, out)
	}

	r, out := s.reencrypt(config, 1, "--encrypt-plaintext")
	if r.Plaintext != 0 || r.Foreign != 1 || r.Rewritten != 1 || r.OK {
		t.Errorf("--encrypt-plaintext: %s", out)
	}
	got, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte(plain)})
	if err != nil || string(got.Kvs[0].Value) != "forged" {
		t.Errorf("%v, %v", got, err)
	}
	if got := get(t, s.kv, foreign); string(got.Value) != marker+"other:forged" {
		t.Errorf("the foreign value is %q", got.Value)
	}
	log, err := os.ReadFile(filepath.Join(s.Dir, "audit.commands.log"))
	if err != nil {
		t.Fatal(err)
	}
	records := 0
	for line := range bytes.Lines(log) {
		var record struct{ Command, Outcome, Reason string }
		if err := json.Unmarshal(line, &record); err != nil {
			t.Fatal(err)
		}
		if record.Command == "reencrypt" && record.Outcome == "begun" && record.Reason == "with --encrypt-plaintext" {
			records++
		}
	}
	if records != 1 {
		t.Errorf("the audit log tells of it %d times: %s", records, log)
	}
}
