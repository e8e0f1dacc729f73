package keyring

import (
	"bytes"
	"errors"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// tryOpen has the rule decrypt a value without waiting, and checks that a value which would need
// the KMS is unchanged and not counted.
func (g *rig) tryOpen(t *testing.T, key string, stored []byte) (string, error) {
	t.Helper()
	own := bytes.Clone(stored)
	calls, misses := g.kms.count("Decrypt"), g.events.get(g.kms.name+" miss")
	ready := g.sealer.Ready(own)
	if !bytes.Equal(own, stored) {
		t.Error("Ready changes the value")
	}
	value, err := g.sealer.TryOpen([]byte(key), own)
	if g.kms.count("Decrypt") != calls || g.events.get(g.kms.name+" miss") != misses {
		t.Error("TryOpen or Ready calls the KMS")
	}
	if errors.Is(err, ErrWouldBlock) {
		if ready {
			t.Error("TryOpen would block although the value is ready")
		}
		if !bytes.Equal(own, stored) {
			t.Error("TryOpen changes a value that it does not decrypt")
		}
	}
	return string(value), err
}

// TestTryOpen: a value whose seed is cached is decrypted, any other needs a call that may wait.
func TestTryOpen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		foreign := kms.sealed(t, "k", "foreign")
		g := newRing(t, kms, nil).start(t)
		own := g.mustSeal(t, "k", "own")
		for name, c := range map[string]struct{ stored, want string }{
			"encrypted here":       {string(own), "own"},
			"plaintext":            {"plain", "plain"},
			"of another provider":  {"k8s:enc:kms:v2:other:x", "k8s:enc:kms:v2:other:x"},
			"of another marker":    {"k8s:enc:x", "k8s:enc:x"},
			"the beginning of one": {"k8s:enc:kms", "k8s:enc:kms"},
		} {
			if got, err := g.tryOpen(t, "k", []byte(c.stored)); name != "the beginning of one" && (err != nil || got != c.want) {
				t.Errorf("%s: %q, %v", name, got, err)
			}
		}
		for range 2 {
			if got, err := g.tryOpen(t, "k", foreign); !errors.Is(err, ErrWouldBlock) {
				t.Fatalf("of a seed that is not cached: %q, %v", got, err)
			}
		}
		g.mustOpen(t, "k", foreign, "foreign")
		if got, err := g.tryOpen(t, "k", foreign); err != nil || got != "foreign" || !g.sealer.Ready(foreign) {
			t.Errorf("of a seed that is cached: %q, %v", got, err)
		}
		time.Sleep(24*time.Hour + time.Second) // the TTL
		if _, err := g.tryOpen(t, "k", foreign); !errors.Is(err, ErrWouldBlock) {
			t.Errorf("of a seed past its TTL: %v", err)
		}
		_, err := g.tryOpen(t, "k", own[:len(own)-1])
		wantKind(t, err, Corrupt)
	})
}

// TestTryOpenUnverified: a value that does not decrypt with a seed which has decrypted none yet is
// left for a call that may ask the KMS again.
func TestTryOpenUnverified(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		g := newRing(t, kms, nil).start(t)
		g.mustSeal(t, "k", "v")
		stored := kms.sealed(t, "k", "v")
		kms.set(func() {
			kms.result = func(b []byte) []byte { b = bytes.Clone(b); b[0]++; return b }
		})
		_, err := g.open("k", stored)
		wantKind(t, err, Corrupt)
		_, err = g.tryOpen(t, "k", stored)
		wantKind(t, err, Corrupt) // for a time, without a call
		time.Sleep(time.Minute)
		kms.set(func() { kms.result = nil })
		if _, err := g.tryOpen(t, "k", stored); !errors.Is(err, ErrWouldBlock) {
			t.Errorf("a seed that may be another one by now: %v", err)
		}
		if got, err := g.sealer.Open(t.Context(), []byte("k"), bytes.Clone(stored)); err != nil || string(got) != "v" {
			t.Errorf("in place, with the other secret: %q, %v", got, err)
		}
	})
}

// TestTryWithoutTheKMS: while the KMS does not answer, a seed past its TTL is used at once; once
// the key is revoked, the error is final.
func TestTryWithoutTheKMS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		g := newRing(t, kms, func(c *RingConfig, _ *CacheConfig) { c.ReadOnly = true }).start(t)
		stored := kms.sealed(t, "k", "v")
		g.mustOpen(t, "k", stored, "v")
		kms.set(func() { kms.down = kmsError("Status", kmsclient.Unreachable) })
		time.Sleep(25 * time.Hour)
		for range 2 {
			own := bytes.Clone(stored)
			if got, err := g.sealer.TryOpen([]byte("k"), own); err != nil || string(got) != "v" {
				t.Fatalf("%q, %v", got, err)
			}
			synctest.Wait()
		}
		kms.set(func() { kms.down = kmsError("Status", kmsclient.KeyDisabled) })
		time.Sleep(2 * time.Minute)
		_, err := g.tryOpen(t, "k", stored)
		wantKind(t, err, KeyUnusable)
		if !g.sealer.Ready(stored) {
			t.Error("a value whose error is final is not ready")
		}
	})
}

// TestTrySeal: before the first seed is there a value would have to wait for it.
func TestTrySeal(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		g := newRing(t, kms, nil)
		if _, err := g.sealer.TrySeal([]byte("k"), []byte("v")); !errors.Is(err, ErrWouldBlock) {
			t.Errorf("before the first contact: %v", err)
		}
		g.start(t)
		g.mustSeal(t, "k", "v")
		stored, err := g.sealer.TrySeal([]byte("k"), []byte("v"))
		if err != nil {
			t.Fatal(err)
		}
		g.mustOpen(t, "k", stored, "v")
		kms.set(func() { kms.down = kmsError("Status", kmsclient.KeyDisabled) })
		time.Sleep(2 * time.Minute)
		_, err = g.sealer.TrySeal([]byte("k"), []byte("v"))
		wantKind(t, err, KeyUnusable)
	})
}

// TestTryAllocatesNothing: beyond what is stored, and nothing at all to decrypt.
func TestTryAllocatesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		g := newRing(t, kms, nil).start(t)
		key, stored := []byte("k"), g.mustSeal(t, "k", "v")
		own := make([]byte, len(stored))
		for range 3 { // the cipher of a value that is read over and over is kept
			if _, err := g.sealer.TryOpen(key, append(own[:0], stored...)); err != nil {
				t.Fatal(err)
			}
		}
		if n := testing.AllocsPerRun(100, func() {
			if !g.sealer.Ready(stored) {
				t.Error("not ready")
			}
			if _, err := g.sealer.TryOpen(key, append(own[:0], stored...)); err != nil {
				t.Error(err)
			}
		}); n > 2 { // the events' names
			t.Errorf("%v allocations", n)
		}
	})
}
