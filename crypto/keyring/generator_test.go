package keyring_test

import (
	"context"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestNewKeyIDMintsOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		old := g.MustWrite(t, "k", "v")
		if _, s, err := g.Sealer.Inspect(context.Background(), []byte("k"), old); s != keyring.Current || err != nil {
			t.Errorf("Inspect = %v, %v", s, err)
		}
		kms.Rotate("key-2")
		time.Sleep(time.Minute)
		synctest.Wait()
		stored := g.MustWrite(t, "k", "v")
		if id := ringtest.KeyIDOf(t, stored); id != "key-2" {
			t.Errorf("sealed under %q after the rotation", id)
		}
		if n := kms.Count("Encrypt"); n != 2 {
			t.Errorf("%d DEK seeds generated", n)
		}
		g.MustRead(t, "k", old, "v")
		for want, v := range map[keyring.ValueState][]byte{keyring.Current: stored, keyring.Stale: old} {
			if _, s, err := g.Sealer.Inspect(context.Background(), []byte("k"), v); s != want || err != nil {
				t.Errorf("Inspect = %v, %v, want %v", s, err, want)
			}
		}
		time.Sleep(time.Hour)
		if n := kms.Count("Encrypt"); n != 2 {
			t.Errorf("%d DEK seeds generated an hour later", n)
		}
	})
}

func TestStatusAndEncryptDisagree(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		kms.StatusID = "key-0" // for ever
		g := ringtest.NewRig(t, kms, nil).Start(t)
		stored := g.MustWrite(t, "k", "v")
		if id := ringtest.KeyIDOf(t, stored); id != "key-1" {
			t.Errorf("sealed under %q, not what Encrypt answered", id)
		}
		if _, s, _ := g.Sealer.Inspect(context.Background(), []byte("k"), stored); s != keyring.Stale {
			t.Errorf("a value not under Status' key ID is %v", s)
		}
		time.Sleep(24 * time.Hour)
		if n := kms.Count("Encrypt"); n < 10 || n > 50 {
			t.Errorf("%d DEK seeds generated in a day of disagreement", n)
		}
		g.MustRead(t, "k", stored, "v")
		// Status catches up: nothing is left to do.
		kms.Set(func() { kms.StatusID = ""; kms.Calls = map[string]int{} })
		time.Sleep(24 * time.Hour)
		if n := kms.Count("Encrypt"); n > 1 {
			t.Errorf("%d DEK seeds generated in a day of agreement", n)
		}
	})
	synctest.Test(t, func(t *testing.T) { // a rotation that Encrypt sees later than Status
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		g.MustWrite(t, "k", "v")
		kms.Set(func() { kms.StatusID = "key-2" })
		time.Sleep(time.Minute)
		synctest.Wait()
		kms.Rotate("key-2")
		time.Sleep(2 * time.Minute)
		if id := ringtest.KeyIDOf(t, g.MustWrite(t, "k", "v")); id != "key-2" {
			t.Errorf("still sealed under %q", id)
		}
	})
}

func TestMintOnAgeAndOnCount(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.MaxAge = 24 * time.Hour }).Start(t)
		first := g.MustWrite(t, "k", "v")
		time.Sleep(10*24*time.Hour + time.Minute)
		if n := kms.Count("Encrypt"); n != 11 {
			t.Errorf("%d DEK seeds generated in ten days", n)
		}
		g.MustRead(t, "k", first, "v")
		kms.Set(func() { kms.OpErr["Encrypt"] = ringtest.KMSError("Encrypt", kmsclient.Unreachable) })
		time.Sleep(24*time.Hour + 30*time.Minute)
		g.MustWrite(t, "k", "v") // the old seed, as long as SealUnreachableFor says
		time.Sleep(time.Hour)
		_, err := g.Write("k", "v")
		ringtest.WantKind(t, err, keyring.Unavailable)
	})
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.MaxSeals = 10 }).Start(t)
		for range 35 {
			g.MustWrite(t, "k", "v")
			time.Sleep(2 * time.Second)
		}
		if n := kms.Count("Encrypt"); n < 3 || n > 5 {
			t.Errorf("%d DEK seeds generated for 35 values at 10 each", n)
		}
	})
}

// TestGenerationThatIsLost: the KMS did the work and the answer was lost. A second seed is
// generated; nothing is sealed under the first.
func TestGenerationThatIsLost(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		kms.Lost = ringtest.KMSError("GenerateDataKey", kmsclient.Unreachable)
		g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.KMS = &ringtest.KeyMaker{KMS: kms} }).Start(t)
		synctest.Wait()
		_, err := g.Write("k", "v")
		ringtest.WantKind(t, err, keyring.Unavailable)
		kms.Set(func() { kms.Lost = nil })
		time.Sleep(10 * time.Second)
		g.MustRead(t, "k", g.MustWrite(t, "k", "v"), "v")
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
				kms := ringtest.NewKMS(t, "ack")
				g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) {
					c.KMS = &ringtest.KeyMaker{KMS: kms, Change: change}
				}).Start(t)
				synctest.Wait()
				_, err := g.Write("k", "v")
				ringtest.WantKind(t, err, keyring.Unavailable)
				if !strings.Contains(err.Error(), "the response of the KMS is wrong") {
					t.Error(err)
				}
			})
		})
	}
}

func TestStatusGarbage(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		kms.StatusID = strings.Repeat("k", 1025)
		g := ringtest.NewRig(t, kms, nil).Start(t)
		synctest.Wait()
		_, err := g.Write("k", "v")
		ringtest.WantKind(t, err, keyring.Unavailable)
	})
}
