package reencrypt

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/encoding/protowire"
	kmsapi "k8s.io/kms/apis/v2"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestValues re-encrypts every kind of value: plaintext of all sizes, with leases, under an older
// key, of another provider and of type 0, and back. What cannot be decrypted is left and named, and
// current values are not changed.
func TestValues(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"3.5", "3.7"} {
		for _, txnKeys := range []string{"1", "100"} {
			t.Run(version+"/"+txnKeys, func(t *testing.T) {
				t.Parallel()
				testValues(t, version, txnKeys)
			})
		}
	}
}

func testValues(t *testing.T, version, txnKeys string) {
	s, _ := newSite(t, harness.EtcdConfig{Version: version, MaxRequestBytes: 1536<<10 + 4096})
	s.cfg.Audit = &harness.Audit{Path: filepath.Join(s.Dir, "audit.log")}
	values := s.fill(200)
	values[prefix+"large"] = bytes.Repeat([]byte("large"), 1<<20/5)
	s.put(prefix+"large", values[prefix+"large"], 0)

	lease, err := pb.NewLeaseClient(s.conn).LeaseGrant(t.Context(), &pb.LeaseGrantRequest{TTL: 3600})
	if err != nil {
		t.Fatal(err)
	}
	values[prefix+"leased"] = []byte("leased")
	s.put(prefix+"leased", []byte("leased"), lease.ID)

	// By another provider, and under the provider's own older key.
	dev := s.cfg
	dev.Rules = []harness.Rule{{Prefix: prefix, WriteWith: "dev", ReadWith: []string{"main"}, AllowPlaintextReads: new(true)}}
	for name, c := range map[string]harness.ProxyConfig{"dev": dev, "main": s.cfg} {
		p := s.NewProxy(name, c)
		p.Args = []string{"--allow-weakening"}
		p.Start()
		p.WaitReady(within)
		kv := pb.NewKVClient(harness.Dial(t, p.Address, nil))
		for _, key := range []string{prefix + "by-" + name, prefix + "by-" + name + "-empty"} {
			if !strings.HasSuffix(key, "empty") {
				values[key] = []byte("value of " + key)
			} else {
				values[key] = nil
			}
			if _, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte(key), Value: values[key]}); err != nil {
				t.Fatal(err)
			}
		}
		p.Stop(within)
	}
	values[prefix+"type0"] = []byte("the value of type 0")
	s.put(prefix+"type0", s.typeZero(prefix+"type0", values[prefix+"type0"]), 0)
	s.kms.Rotate()

	// What is left unchanged.
	foreign, damaged := []byte(marker+"nobody:something"), append([]byte{}, get(t, s.kv, prefix+"by-main").Value...)
	damaged[len(damaged)-1] ^= 1
	s.put(prefix+"x-foreign", foreign, 0)
	s.put(prefix+"x-damaged", damaged, 0)
	s.put("/clear/a", []byte("without a rule"), 0)

	config := s.config("run", s.cfg)
	r, out := s.reencrypt(config, 0, "--txn-keys", txnKeys, "--prefix", prefix+"k", "--dry-run")
	if r.Rewritten != 200 || !strings.Contains(out, "200 of 200 values will be rewritten") || s.changed(t.Context()) != 0 {
		t.Errorf("dry run: %s", out)
	}
	total := int64(len(values))
	r, out = s.reencrypt(config, 1, "--txn-keys", txnKeys)
	if r.Rewritten != total || r.Foreign != 1 || r.Undecryptable != 1 || r.Failed != 0 || r.Raced != 0 || r.Keys != total+2 || r.Passes != 2 || r.OK {
		t.Errorf("report: %s", out)
	}
	if txnKeys == "1" && r.Transactions != total || txnKeys != "1" && r.Transactions > total/10 {
		t.Errorf("%d transactions for %d values", r.Transactions, total)
	}
	if len(r.Left) != 2 || r.Left[0].Key != prefix+"x-damaged" || r.Left[1].Key != prefix+"x-foreign" {
		t.Errorf("left: %v", r.Left)
	}
	if !bytes.Equal(get(t, s.kv, prefix+"x-foreign").Value, foreign) || !bytes.Equal(get(t, s.kv, prefix+"x-damaged").Value, damaged) {
		t.Error("what cannot be rewritten was")
	}
	if kv := get(t, s.kv, "/clear/a"); kv.Version != 1 || string(kv.Value) != "without a rule" {
		t.Errorf("a key without a rule was written: %v", kv)
	}
	for _, key := range []string{prefix + "x-foreign", prefix + "x-damaged"} {
		if _, err := s.kv.DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte(key)}); err != nil {
			t.Fatal(err)
		}
	}
	s.sealed(values, 2)
	if got := get(t, s.kv, prefix+"leased").Lease; got != lease.ID {
		t.Errorf("the lease is %x, want %x", got, lease.ID)
	}
	ttl, err := pb.NewLeaseClient(s.conn).LeaseTimeToLive(t.Context(), &pb.LeaseTimeToLiveRequest{ID: lease.ID, Keys: true})
	if err != nil || len(ttl.Keys) != 1 || string(ttl.Keys[0]) != prefix+"leased" {
		t.Errorf("the lease has the keys %q: %v", ttl.GetKeys(), err)
	}
	if r, out = s.reencrypt(config, 0); r.Rewritten != 0 || r.Current != total || r.Transactions != 0 || r.Passes != 1 {
		t.Errorf("a second run: %s", out)
	}
	p := s.StartProxy("reader", s.cfg)
	p.WaitReady(within)
	s.opens(p, values)
	p.Stop(within)

	// After a rotation, and back to plaintext.
	s.kms.Rotate()
	if r, out = s.reencrypt(config, 0, "--txn-keys", txnKeys, "--workers", "4"); r.Rewritten != total || r.Decrypted != 0 {
		t.Errorf("after a rotation: %s", out)
	}
	if r, out = s.reencrypt(s.config("off", s.plaintextRule()), 0, "--txn-keys", txnKeys, "--ignore-proxies"); r.Rewritten != total || r.Decrypted != total {
		t.Errorf("off: %s", out)
	}
	for _, kv := range all(t, s.kv) {
		if want, ok := values[string(kv.Key)]; !ok || !bytes.Equal(kv.Value, want) || kv.Version > 4 {
			t.Errorf("%s, written %d times, is not what it was at first", kv.Key, kv.Version)
		}
	}
	if got := get(t, s.kv, prefix+"leased").Lease; got != lease.ID {
		t.Errorf("the lease is %x, want %x", got, lease.ID)
	}
	log, err := os.ReadFile(filepath.Join(s.Dir, "audit.commands.log"))
	if err != nil {
		t.Fatal(err)
	}
	// Neither the dry run nor the run that found nothing to do is recorded.
	for what, n := range map[string]int{`"outcome":"begun"`: 3, `"outcome":"ok"`: 2, `"outcome":"failed"`: 1, fmt.Sprintf(`"keys":%d,`, total): 6} {
		if got := strings.Count(string(log), what); got != n {
			t.Errorf("the audit log has %s %d times, want %d: %s", what, got, n, log)
		}
	}
}

// typeZero encrypts a value like Kubernetes before 1.29: with AES-GCM directly under the key that
// the KMS wrapped.
func (s *site) typeZero(key string, value []byte) []byte {
	s.t.Helper()
	dek := make([]byte, 32)
	rand.Read(dek)
	wrapped, err := s.kms.Encrypt(s.t.Context(), &kmsapi.EncryptRequest{Plaintext: dek})
	if err != nil {
		s.t.Fatal(err)
	}
	block, err := aes.NewCipher(dek)
	if err != nil {
		s.t.Fatal(err)
	}
	aead, err := cipher.NewGCM(block)
	if err != nil {
		s.t.Fatal(err)
	}
	nonce := make([]byte, aead.NonceSize())
	rand.Read(nonce)
	field := func(b []byte, n protowire.Number, v []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), v)
	}
	object := field(nil, 1, aead.Seal(nonce, nonce, value, []byte(key)))
	object = field(object, 2, []byte(wrapped.KeyId))
	object = field(object, 3, wrapped.Ciphertext)
	for name, annotation := range wrapped.Annotations {
		object = field(object, 4, field(field(nil, 1, []byte(name)), 2, annotation))
	}
	return append([]byte(marker+"main:"), object...)
}
