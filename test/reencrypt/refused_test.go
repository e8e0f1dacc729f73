package reencrypt

import (
	"bytes"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// rewrap changes the wrapped DEK seed of a stored value, or an annotation of it.
func rewrap(t *testing.T, stored []byte, change func(o *envelope.Object)) []byte {
	t.Helper()
	_, object, ok := envelope.Split(stored)
	if !ok {
		t.Fatal("the value is not encrypted")
	}
	o, err := envelope.Parse(object)
	if err != nil {
		t.Fatal(err)
	}
	o.Source = bytes.Clone(o.Source)
	change(&o)
	damaged, err := o.Append(bytes.Clone(stored[:len(stored)-len(object)]))
	if err != nil {
		t.Fatal(err)
	}
	return damaged
}

// TestRefusedSeeds uses a plugin that returns the same error for every failure. Values whose DEK
// seeds it refuses, or does not answer for, must not delay others: all others are re-encrypted, and
// each command counts and names them.
func TestRefusedSeeds(t *testing.T) {
	t.Parallel()
	for _, statusFailsFor := range []time.Duration{0, 5 * time.Second} {
		t.Run(statusFailsFor.String(), func(t *testing.T) {
			t.Parallel()
			testRefusedSeeds(t, statusFailsFor)
		})
	}
}

func testRefusedSeeds(t *testing.T, statusFailsFor time.Duration) {
	s, _ := newSite(t, harness.EtcdConfig{})
	s.kms.OmitReasons(true)
	s.cfg.KMS[0].Plugin.Timeout = "500ms" // for the one without an answer
	p := s.StartProxy("proxy", s.cfg)
	p.WaitReady(within)
	kv := pb.NewKVClient(harness.Dial(t, p.Address, nil))
	values := make(map[string][]byte)
	for n := range 60 {
		key := fmt.Sprintf("%sk%02d", prefix, n)
		values[key] = fmt.Appendf(nil, "value %d", n)
		if _, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte(key), Value: values[key]}); err != nil {
			t.Fatal(err)
		}
	}
	p.Stop(within)
	good := get(t, s.kv, prefix+"k00").Value
	damaged := rewrap(t, good, func(o *envelope.Object) { o.Source[len(o.Source)-1] ^= 1 })
	refused := []string{prefix + "a-damaged", prefix + "k10-damaged", prefix + "k20-annotation", prefix + "k30-another"}
	s.put(refused[0], damaged, 0)
	s.put(refused[1], damaged, 0)
	s.put(refused[2], rewrap(t, good, func(o *envelope.Object) {
		o.Annotations = map[string][]byte{"version.test.etcd-kms-proxy.io": []byte("7")}
	}), 0)
	s.put(refused[3], rewrap(t, good, func(o *envelope.Object) {
		o.Source[0] ^= 1
		if statusFailsFor == 0 {
			s.kms.Hang(o.Source)
		}
	}), 0)
	s.kms.Rotate()
	s.kms.FailStatusAfterErrors(statusFailsFor)

	config := s.config("run", s.cfg)
	check := func(r report, out string) {
		t.Helper()
		if r.Rewritten != int64(len(values)) || r.Refused != int64(len(refused)) || r.Undecryptable+r.Failed+r.Foreign != 0 || r.OK {
			t.Errorf("report: %s", out)
		}
		var left []string
		for _, l := range r.Left {
			left = append(left, l.Key)
			if !strings.Contains(l.Why, "does not unwrap its DEK seed") || strings.Contains(l.Why, prefix+"k") || strings.Contains(l.Why, prefix+"a") {
				t.Errorf("%s: %s", l.Key, l.Why)
			}
		}
		if !slices.Equal(left, refused) {
			t.Errorf("left: %v", left)
		}
	}
	r, out := s.reencrypt(config, 1, "--dry-run")
	check(r, out)
	if s.changed(t.Context()) != 0 {
		t.Error("the dry run wrote")
	}
	r, out = s.reencrypt(config, 1)
	check(r, out)
	for key := range values {
		if kv := get(t, s.kv, key); kv.Version != 2 || !bytes.HasPrefix(kv.Value, []byte(marker)) {
			t.Errorf("%s: version %d", key, kv.Version)
		}
	}
	for _, key := range refused {
		if kv := get(t, s.kv, key); kv.Version != 1 {
			t.Errorf("%s was written", key)
		}
	}

	answered := 4
	if statusFailsFor == 0 {
		answered = 3
	}
	out, code := s.Run("status", "--config", config, "--list")
	if code != 1 || !strings.Contains(out, fmt.Sprintf(`under "/sealed/", %d values are unavailable although the KMS responds`, answered)) {
		t.Errorf("status: exit code %d: %s", code, out)
	}
	for _, key := range refused {
		if !strings.Contains(out, "unavailable\t"+key) {
			t.Errorf("status --list does not name %s: %s", key, out)
		}
	}
	// verify knows nothing of the value without an answer; the others are findings.
	out, code = s.Run("verify", "--config", config, "--list")
	if code != 1 || strings.Contains(out, fmt.Sprintf("%q was not decrypted", refused[3])) != (statusFailsFor == 0) {
		t.Errorf("verify: exit code %d: %s", code, out)
	}
	for _, key := range refused[:answered] {
		if !strings.Contains(out, fmt.Sprintf("etcd: live %q", key)) {
			t.Errorf("verify does not find %s: %s", key, out)
		}
	}
	out, code = s.Run("decrypt", "--config", config, "--prefix", "--yes", "--audit-file", s.Dir+"/decrypt.jsonl", prefix)
	opened := 0
	for line := range strings.Lines(out) {
		var v struct {
			Key, State, Error string
			Value             []byte
		}
		if json.Unmarshal([]byte(line), &v) != nil {
			continue
		}
		if want, ok := values[v.Key]; ok && bytes.Equal(v.Value, want) {
			opened++
		} else if !slices.Contains(refused, v.Key) || v.State != "unavailable" || v.Error == "" || v.Value != nil {
			t.Errorf("decrypt: %s", line)
		}
	}
	if code != 1 || opened != len(values) {
		t.Errorf("decrypt: exit code %d, %d values", code, opened)
	}
}

// TestAnsweredOutage checks that reencrypt waits for a plugin that returns the same error for every
// call while its KMS is unreachable, and skips no value.
func TestAnsweredOutage(t *testing.T) {
	t.Parallel()
	s, _ := newSite(t, harness.EtcdConfig{})
	s.kms.OmitReasons(true)
	values := s.fill(20)
	config := s.config("run", s.cfg)
	if r, out := s.reencrypt(config, 0); r.Rewritten != int64(len(values)) {
		t.Fatal(out)
	}
	s.kms.Rotate()
	s.kms.Down(true)
	p := s.Spawn("outage", "reencrypt", "--config", config, "--timeout", "2s", "--output", "json")
	waitOutput(t, p, "waiting (the KMS)")
	s.kms.Down(false)
	if code := p.Wait(within); code != 0 {
		t.Fatalf("exit code %d: %s", code, p.Log())
	}
	if r := decode(t, p.Log()); r.Rewritten != int64(len(values)) || !r.OK {
		t.Errorf("report: %s", p.Log())
	}
	s.sealed(values, 3)

	// verify must not report an outage as findings either.
	s.kms.Down(true)
	out, _ := s.Run("verify", "--config", config, "--timeout", "2s", "--list")
	for line := range strings.Lines(out) { // the plaintext in the history is a finding
		if strings.Contains(line, "etcd: live") && !strings.Contains(line, "was not decrypted") {
			t.Error(line)
		}
	}
	if !strings.Contains(out, fmt.Sprintf(`etcd: live %q was not decrypted`, prefix+"k00000")) {
		t.Errorf("verify: %s", out)
	}
	s.kms.Down(false)
}

// TestManyOfARefusedSeed checks that many values of one refused DEK seed, more than are set aside
// at a time, cause a few KMS calls in total and not some for each, and that good values among them
// are rewritten.
func TestManyOfARefusedSeed(t *testing.T) {
	t.Parallel()
	s, _ := newSite(t, harness.EtcdConfig{})
	s.kms.OmitReasons(true)
	s.put(prefix+"m", []byte("good"), 0)
	config := s.config("run", s.cfg)
	s.reencrypt(config, 0)
	damaged := rewrap(t, get(t, s.kv, prefix+"m").Value, func(o *envelope.Object) { o.Source[len(o.Source)-1] ^= 1 })
	const many = 1500
	for n := range many {
		s.put(fmt.Sprintf("%sk%04d", prefix, n), damaged, 0)
	}
	s.kms.Rotate()
	_, before := s.kms.Calls()
	r, out := s.reencrypt(config, 1)
	_, after := s.kms.Calls()
	if r.Refused != many || r.Rewritten != 1 || r.Undecryptable != 0 || len(r.Left) != 100 {
		t.Errorf("report: %s", out)
	}
	if calls := after - before; calls > 100 {
		t.Errorf("%d calls of the KMS", calls)
	}
	if _, before = s.kms.Calls(); before > 0 {
		out, code := s.Run("status", "--config", config)
		if _, after = s.kms.Calls(); code != 1 || after-before > 100 || !strings.Contains(out, "under \"/sealed/\", 1500 values are unavailable") {
			t.Errorf("status: exit code %d, %d calls: %s", code, after-before, out)
		}
	}
}
