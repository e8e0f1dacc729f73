package keyring

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestNewKeyIDMintsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		g := newRing(t, kms, nil).start(t)
		old := g.mustSeal(t, "k", "v")
		if _, s, err := g.sealer.Inspect(context.Background(), []byte("k"), old); s != Current || err != nil {
			t.Errorf("Inspect = %v, %v", s, err)
		}
		kms.rotate("key-2")
		time.Sleep(time.Minute)
		synctest.Wait()
		stored := g.mustSeal(t, "k", "v")
		if id := keyIDOf(t, stored); id != "key-2" {
			t.Errorf("sealed under %q after the rotation", id)
		}
		if n := kms.count("Encrypt"); n != 2 {
			t.Errorf("%d DEK seeds generated", n)
		}
		g.mustOpen(t, "k", old, "v")
		for want, v := range map[ValueState][]byte{Current: stored, Stale: old} {
			if _, s, err := g.sealer.Inspect(context.Background(), []byte("k"), v); s != want || err != nil {
				t.Errorf("Inspect = %v, %v, want %v", s, err, want)
			}
		}
		time.Sleep(time.Hour)
		if n := kms.count("Encrypt"); n != 2 {
			t.Errorf("%d DEK seeds generated an hour later", n)
		}
	})
}

func TestStatusAndEncryptDisagree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		kms.statusID = "key-0" // for ever
		g := newRing(t, kms, nil).start(t)
		stored := g.mustSeal(t, "k", "v")
		if id := keyIDOf(t, stored); id != "key-1" {
			t.Errorf("sealed under %q, not what Encrypt answered", id)
		}
		if _, s, _ := g.sealer.Inspect(context.Background(), []byte("k"), stored); s != Stale {
			t.Errorf("a value not under Status' key ID is %v", s)
		}
		time.Sleep(24 * time.Hour)
		if n := kms.count("Encrypt"); n < 10 || n > 50 {
			t.Errorf("%d DEK seeds generated in a day of disagreement", n)
		}
		g.mustOpen(t, "k", stored, "v")
		// Status catches up: nothing is left to do.
		kms.set(func() { kms.statusID = ""; kms.calls = map[string]int{} })
		time.Sleep(24 * time.Hour)
		if n := kms.count("Encrypt"); n > 1 {
			t.Errorf("%d DEK seeds generated in a day of agreement", n)
		}
	})
	synctest.Test(t, func(t *testing.T) { // a rotation that Encrypt sees later than Status
		kms := newKMS(t, "ack")
		g := newRing(t, kms, nil).start(t)
		g.mustSeal(t, "k", "v")
		kms.set(func() { kms.statusID = "key-2" })
		time.Sleep(time.Minute)
		synctest.Wait()
		kms.rotate("key-2")
		time.Sleep(2 * time.Minute)
		if id := keyIDOf(t, g.mustSeal(t, "k", "v")); id != "key-2" {
			t.Errorf("still sealed under %q", id)
		}
	})
}

func TestMintOnAgeAndOnCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		g := newRing(t, kms, func(c *RingConfig, _ *CacheConfig) { c.MaxAge = 24 * time.Hour }).start(t)
		first := g.mustSeal(t, "k", "v")
		time.Sleep(10*24*time.Hour + time.Minute)
		if n := kms.count("Encrypt"); n != 11 {
			t.Errorf("%d DEK seeds generated in ten days", n)
		}
		g.mustOpen(t, "k", first, "v")
		kms.set(func() { kms.opErr["Encrypt"] = kmsError("Encrypt", kmsclient.Unreachable) })
		time.Sleep(24*time.Hour + 30*time.Minute)
		g.mustSeal(t, "k", "v") // the old seed, as long as SealUnreachableFor says
		time.Sleep(time.Hour)
		_, err := g.seal("k", "v")
		wantKind(t, err, Unavailable)
	})
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		g := newRing(t, kms, func(c *RingConfig, _ *CacheConfig) { c.MaxSeals = 10 }).start(t)
		for range 35 {
			g.mustSeal(t, "k", "v")
			time.Sleep(2 * time.Second)
		}
		if n := kms.count("Encrypt"); n < 3 || n > 5 {
			t.Errorf("%d DEK seeds generated for 35 values at 10 each", n)
		}
	})
}

// TestGenerationThatIsLost: the KMS did the work and the answer was lost. A second seed is
// generated; nothing is sealed under the first.
func TestGenerationThatIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		kms.lost = kmsError("GenerateDataKey", kmsclient.Unreachable)
		g := newRing(t, kms, func(c *RingConfig, _ *CacheConfig) { c.KMS = &keyMaker{fakeKMS: kms} }).start(t)
		synctest.Wait()
		_, err := g.seal("k", "v")
		wantKind(t, err, Unavailable)
		kms.set(func() { kms.lost = nil })
		time.Sleep(10 * time.Second)
		g.mustOpen(t, "k", g.mustSeal(t, "k", "v"), "v")
	})
}

func TestMintGarbage(t *testing.T) {
	for name, change := range map[string]func(*kmsclient.DataKey){
		"short seed":       func(k *kmsclient.DataKey) { k.Plaintext = k.Plaintext[:31] },
		"no seed":          func(k *kmsclient.DataKey) { k.Plaintext = nil },
		"no key ID":        func(k *kmsclient.DataKey) { k.KeyID = "" },
		"over-long key ID": func(k *kmsclient.DataKey) { k.KeyID = strings.Repeat("k", 1025) },
		"no ciphertext":    func(k *kmsclient.DataKey) { k.Ciphertext = nil },
		"long ciphertext":  func(k *kmsclient.DataKey) { k.Ciphertext = make([]byte, 1025) },
		"seed in clear":    func(k *kmsclient.DataKey) { k.Ciphertext = append([]byte("id:"), k.Plaintext...) },
		"annotation":       func(k *kmsclient.DataKey) { k.Annotations = map[string][]byte{"nodot": nil} },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				kms := newKMS(t, "ack")
				g := newRing(t, kms, func(c *RingConfig, _ *CacheConfig) { c.KMS = &keyMaker{kms, change} }).start(t)
				synctest.Wait()
				_, err := g.seal("k", "v")
				wantKind(t, err, Unavailable)
				if !strings.Contains(err.Error(), "the response of the KMS is wrong") {
					t.Error(err)
				}
			})
		})
	}
}

func TestStatusGarbage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		kms.statusID = strings.Repeat("k", 1025)
		g := newRing(t, kms, nil).start(t)
		synctest.Wait()
		_, err := g.seal("k", "v")
		wantKind(t, err, Unavailable)
	})
}
