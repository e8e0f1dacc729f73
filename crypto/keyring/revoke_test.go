package keyring

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestUnusableKeyRevokesWithinTheInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		foreign := kms.sealed(t, "k", "v")
		g := newRing(t, kms, func(c *RingConfig, _ *CacheConfig) { c.PollInterval, c.RevokeWithin = time.Hour, 5*time.Second }).start(t)
		stored := g.mustSeal(t, "k", "v")
		g.mustOpen(t, "k", foreign, "v")
		kms.set(func() { kms.down = kmsError("Status", kmsclient.KeyDisabled) })
		time.Sleep(5 * time.Second)
		synctest.Wait()
		for range 3 { // and so it stays
			_, err := g.seal("k", "v")
			wantKind(t, err, KeyUnusable)
			for _, part := range []string{`"/s/"`, `"ack"`, `"key-1"`, `"req-7"`, "disabled"} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("the text does not hold %s: %v", part, err)
				}
			}
			for _, v := range [][]byte{stored, foreign} {
				_, err = g.open("k", v)
				wantKind(t, err, KeyUnusable)
			}
			time.Sleep(time.Minute)
		}
		if n := g.cache.Len(); n != 0 {
			t.Errorf("%d seeds are left in the cache", n)
		}
		if n := kms.count("Decrypt"); n != 1 {
			t.Errorf("%d Decrypt calls: a revoked provider is not asked for values", n)
		}
		if st := g.State(); !st.Revoked || st.CanSeal || st.Healthy || g.sealer.Health() == nil {
			t.Errorf("State = %+v", st)
		}
		if g.events.get("ack revoked") != 1 {
			t.Errorf("%d revocations were reported", g.events.get("ack revoked"))
		}
		// An outage on top does not lift it.
		kms.set(func() { kms.down = kmsError("Status", kmsclient.Unreachable) })
		time.Sleep(time.Minute)
		_, err := g.open("k", stored)
		wantKind(t, err, KeyUnusable)
		// A good status does.
		kms.set(func() { kms.down = nil })
		time.Sleep(5 * time.Second)
		synctest.Wait()
		g.mustOpen(t, "k", stored, "v")
		g.mustOpen(t, "k", foreign, "v")
		g.mustOpen(t, "k", g.mustSeal(t, "k", "w"), "w")
		if n := kms.count("Encrypt"); n != 2 {
			t.Errorf("%d DEK seeds generated: after a revocation comes a new seed", n)
		}
	})
}

// whenBad is an Observer that does something as soon as a contact is said to have been bad, after
// which everybody sees it.
type whenBad struct {
	*events
	do func()
}

func (w *whenBad) Seed(provider string, event Event) {
	w.events.Seed(provider, event)
	if event == EventBad {
		w.do()
	}
}

// TestNothingOpensOnceRevoked: from when a ring is said to be revoked its seeds are gone, and not a
// moment later, also where the key is.
func TestNothingOpensOnceRevoked(t *testing.T) {
	for name, cause := range map[string]error{"disabled": kmsError("Status", kmsclient.KeyDisabled), "gone": goneError("Status")} {
		synctest.Test(t, func(t *testing.T) {
			kms := newKMS(t, "ack")
			foreign := kms.sealed(t, "k", "v")
			w := &whenBad{}
			g := newRing(t, kms, func(c *RingConfig, _ *CacheConfig) { w.events, c.Observer = c.Observer.(*events), w })
			var all [][]byte
			bad := 0
			ended, cancel := context.WithCancel(t.Context())
			cancel()
			w.do = func() {
				bad++
				for _, stored := range all {
					if _, err := g.sealer.Open(ended, []byte("k"), bytes.Clone(stored)); err == nil {
						t.Errorf("%s: a value opens of a key that may not be used, revoked is %t", name, g.State().Revoked)
					}
				}
			}
			g.start(t)
			all = [][]byte{g.mustSeal(t, "k", "v"), foreign}
			for _, stored := range all {
				g.mustOpen(t, "k", stored, "v")
			}
			kms.set(func() { kms.down = cause })
			time.Sleep(5 * time.Minute)
			synctest.Wait()
			if bad != 1 || !g.State().Revoked {
				t.Errorf("%s: %d contacts were said to be bad, revoked is %t", name, bad, g.State().Revoked)
			}
		})
	}
}

func TestDenialRevokesAfterRevokeWithin(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		g := newRing(t, kms, func(c *RingConfig, _ *CacheConfig) { c.RevokeWithin = 5 * time.Minute }).start(t)
		stored := g.mustSeal(t, "k", "v")
		kms.set(func() { kms.down = kmsError("Status", kmsclient.Denied) })
		time.Sleep(3 * time.Minute)
		g.mustOpen(t, "k", stored, "v")
		g.mustSeal(t, "k", "v")
		kms.set(func() { kms.down = nil }) // it passes
		time.Sleep(2 * time.Minute)
		kms.set(func() { kms.down = kmsError("Status", kmsclient.Denied) })
		time.Sleep(4 * time.Minute)
		g.mustOpen(t, "k", stored, "v")
		time.Sleep(2*time.Minute + time.Second)
		_, err := g.open("k", stored)
		wantKind(t, err, KeyUnusable)
		_, err = g.seal("k", "v")
		wantKind(t, err, KeyUnusable)
		if !strings.Contains(err.Error(), "denies") {
			t.Error(err)
		}
		kms.set(func() { kms.down = nil })
		time.Sleep(10 * time.Second)
		g.mustOpen(t, "k", stored, "v")
		g.mustSeal(t, "k", "v")
	})
}

// TestDenialAtStart: there is no seed to lose, and the client hears that an operator has to act.
func TestDenialAtStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		kms.down = kmsError("Status", kmsclient.Denied)
		g := newRing(t, kms, nil).start(t)
		synctest.Wait()
		_, err := g.seal("k", "v")
		wantKind(t, err, KeyUnusable)
	})
}

// TestStatusSaysNothingOfTheKey: Status is answered as ever, and what the key is for is refused:
// reads and writes end as if Status had said so.
func TestStatusSaysNothingOfTheKey(t *testing.T) {
	for _, reason := range []kmsclient.Reason{kmsclient.KeyDisabled, kmsclient.Denied} {
		for name, ops := range map[string][]string{"all": {"Encrypt", "Decrypt"}, "Decrypt alone": {"Decrypt"}} {
			t.Run(fmt.Sprintf("%v %s", reason, name), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					kms := newKMS(t, "ack")
					foreign := kms.sealed(t, "k", "v")
					g := newRing(t, kms, func(c *RingConfig, _ *CacheConfig) { c.PollInterval, c.RevokeWithin = time.Hour, 5*time.Second }).start(t)
					stored := g.mustSeal(t, "k", "v")
					g.mustOpen(t, "k", foreign, "v")
					refuse := func() {
						for _, op := range ops {
							kms.opErr[op] = kmsError(op, reason)
						}
					}
					kms.set(refuse)
					if reason == kmsclient.Denied { // it may pass
						time.Sleep(5 * time.Second)
						g.mustOpen(t, "k", stored, "v")
						g.mustSeal(t, "k", "v")
						kms.set(func() { kms.opErr = map[string]error{} })
						time.Sleep(10 * time.Second)
						kms.set(refuse)
						time.Sleep(5 * time.Second)
					}
					time.Sleep(5 * time.Second)
					synctest.Wait()
					for range 3 { // and so it stays
						_, err := g.seal("k", "v")
						wantKind(t, err, KeyUnusable)
						for _, v := range [][]byte{stored, foreign} {
							_, err = g.open("k", v)
							wantKind(t, err, KeyUnusable)
						}
						time.Sleep(time.Minute)
					}
					if n := g.cache.Len(); n != 0 || !g.State().Revoked || g.sealer.Health() == nil {
						t.Errorf("%d seeds are left, %+v, ready: %v", n, g.State(), g.sealer.Health())
					}
					kms.set(func() { kms.opErr = map[string]error{} })
					time.Sleep(5 * time.Second)
					synctest.Wait()
					g.mustOpen(t, "k", stored, "v")
					g.mustOpen(t, "k", g.mustSeal(t, "k", "w"), "w")
				})
			})
		}
	}
}

// TestNothingIsSealedThatDoesNotOpen: the KMS wraps, and does not unwrap or not to the same. So it
// was from the start, or it begins at the next seed.
func TestNothingIsSealedThatDoesNotOpen(t *testing.T) {
	for name, c := range map[string]struct {
		fault func(*fakeKMS)
		want  Kind
	}{
		"denied":      {func(k *fakeKMS) { k.opErr["Decrypt"] = kmsError("Decrypt", kmsclient.Denied) }, KeyUnusable},
		"unavailable": {func(k *fakeKMS) { k.opErr["Decrypt"] = kmsError("Decrypt", kmsclient.Unreachable) }, Unavailable},
		"invalid":     {func(k *fakeKMS) { k.opErr["Decrypt"] = kmsError("Decrypt", kmsclient.Invalid) }, Unavailable},
		"another":     {func(k *fakeKMS) { k.result = func(b []byte) []byte { return bytes.Repeat([]byte{1}, 32) } }, Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				kms := newKMS(t, "ack")
				c.fault(kms)
				g := newRing(t, kms, nil).start(t)
				synctest.Wait()
				_, err := g.seal("k", "v")
				wantKind(t, err, c.want)
				if g.sealer.Health() == nil || g.State().CanSeal {
					t.Errorf("ready, %+v", g.State())
				}
				kms.set(func() { kms.opErr, kms.result = map[string]error{}, nil })
				time.Sleep(10 * time.Second)
				g.mustOpen(t, "k", g.mustSeal(t, "k", "v"), "v")
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		g := newRing(t, kms, nil).start(t)
		first := keyIDOf(t, g.mustSeal(t, "k", "v"))
		// The key behind the ID is another one: the next seed is of that.
		kms.rotate(first)
		time.Sleep(time.Minute)
		synctest.Wait()
		stored := g.mustSeal(t, "k", "v")
		if n := kms.count("Encrypt"); n != 2 {
			t.Errorf("%d DEK seeds generated", n)
		}
		newRing(t, kms, nil).start(t).mustOpen(t, "k", stored, "v")
		// It breaks: the seed in use is one that will not open, and there is no other.
		for _, fault := range []func(){
			func() { kms.opErr["Decrypt"] = kmsError("Decrypt", kmsclient.Invalid) },
			func() { kms.result = func(b []byte) []byte { return bytes.Repeat([]byte{1}, len(b)) } },
		} {
			kms.set(fault)
			time.Sleep(time.Minute)
			synctest.Wait()
			_, err := g.seal("k", "v")
			wantKind(t, err, Unavailable)
			g.mustOpen(t, "k", stored, "v")
			kms.set(func() { kms.opErr, kms.result = map[string]error{}, nil })
			time.Sleep(10 * time.Second)
			synctest.Wait()
			g.mustSeal(t, "k", "v")
		}
	})
}

// TestStoredValuesCannotRevoke: who can write to etcd can name any key there; that must neither
// take the provider down nor make it call the KMS without end.
func TestStoredValuesCannotRevoke(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		good := kms.sealed(t, "k", "v")
		kms.rotate("key-gone")
		bad := kms.sealed(t, "k", "v")
		kms.rotate("key-now")
		kms.set(func() { delete(kms.keys, "key-gone") })
		g := newRing(t, kms, nil).start(t)
		own := g.mustSeal(t, "k", "own")
		g.mustOpen(t, "k", good, "v")
		kms.set(func() { kms.calls = map[string]int{} })
		for range 600 {
			_, err := g.open("k", bad)
			wantKind(t, err, KeyUnusable)
			g.mustOpen(t, "k", good, "v")
			g.mustOpen(t, "k", own, "own")
			g.mustSeal(t, "k", "v")
			time.Sleep(time.Second)
		}
		if n := kms.count("Status"); n > 75 {
			t.Errorf("%d Status calls in ten minutes", n)
		}
		if n := kms.count("Encrypt"); n != 0 {
			t.Errorf("%d DEK seeds generated in ten minutes", n)
		}
	})
}

// TestOldKeyIsRevoked: the current key is fine, the one before is disabled. Its cached seeds go,
// and nothing else.
func TestOldKeyIsRevoked(t *testing.T) {
	for _, reason := range []kmsclient.Reason{kmsclient.KeyDisabled, kmsclient.Denied} {
		t.Run(fmt.Sprint(reason), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				kms := newKMS(t, "ack")
				g := newRing(t, kms, nil).start(t)
				old := g.mustSeal(t, "k", "old")
				kms.rotate("key-2")
				time.Sleep(time.Minute)
				synctest.Wait()
				now := g.mustSeal(t, "k", "now")
				kms.set(func() { kms.keyErr["key-1"] = kmsError("Decrypt", reason) })
				time.Sleep(time.Minute)
				if reason == kmsclient.Denied {
					g.mustOpen(t, "k", old, "old")
					time.Sleep(2 * time.Minute)
				}
				synctest.Wait()
				_, err := g.open("k", old)
				wantKind(t, err, KeyUnusable)
				g.mustOpen(t, "k", now, "now")
				g.mustSeal(t, "k", "v")
				kms.set(func() { kms.keyErr = map[string]error{} })
				time.Sleep(5 * time.Second) // the refusal is remembered
				g.mustOpen(t, "k", old, "old")
			})
		})
	}
}

// TestUnwrapDuringRevocation: an answer from before the revocation does not bring a seed into the
// cache after it.
func TestUnwrapDuringRevocation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		stored := kms.sealed(t, "k", "v")
		slow := &slowDecrypt{fakeKMS: kms, release: make(chan struct{})}
		g := newRing(t, kms, func(c *RingConfig, _ *CacheConfig) { c.KMS, c.Timeout = slow, time.Hour }).start(t)
		synctest.Wait()
		done := make(chan error)
		go func() { _, err := g.open("k", stored); done <- err }()
		synctest.Wait()
		kms.set(func() { kms.opErr["Status"] = kmsError("Status", kmsclient.KeyDisabled) })
		time.Sleep(time.Minute)
		synctest.Wait()
		close(slow.release)
		if err := <-done; err == nil {
			t.Error("opened with an answer from before the revocation")
		}
		if n := g.cache.Len(); n != 0 {
			t.Errorf("%d seeds in the cache of a revoked provider", n)
		}
	})
}

// TestReadOnlyRing never generates a DEK seed; it decrypts, and is revoked like any other.
func TestReadOnlyRing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "old")
		kms.opErr["Encrypt"] = kmsError("Encrypt", kmsclient.Denied)
		stored := kms.sealed(t, "k", "v")
		g := newRing(t, kms, func(c *RingConfig, _ *CacheConfig) { c.ReadOnly = true }).start(t)
		g.mustOpen(t, "k", stored, "v")
		time.Sleep(time.Hour)
		if n := kms.count("Encrypt"); n != 0 || !g.State().Healthy || g.sealer.Health() != nil {
			t.Errorf("%d DEK seeds generated, %+v, %v", n, g.State(), g.sealer.Health())
		}
		// Status is answered as ever
		kms.set(func() { kms.opErr["Decrypt"] = kmsError("Decrypt", kmsclient.Denied) })
		time.Sleep(2 * time.Minute)
		for range 3 { // with the last seed gone from the cache
			_, err := g.open("k", stored)
			wantKind(t, err, KeyUnusable)
			if !g.State().Revoked || g.sealer.Health() == nil {
				t.Errorf("%+v", g.State())
			}
			time.Sleep(time.Minute)
		}
		kms.set(func() { delete(kms.opErr, "Decrypt") })
		time.Sleep(10 * time.Second)
		g.mustOpen(t, "k", stored, "v")
		if _, err := NewSealer(SealerConfig{Write: g.Ring}); err == nil {
			t.Error("a read-only ring was taken for writing")
		}
		kms.set(func() { kms.down = kmsError("Status", kmsclient.KeyDisabled) })
		time.Sleep(time.Minute)
		_, err := g.open("k", stored)
		wantKind(t, err, KeyUnusable)
		if g.sealer.Health() == nil {
			t.Error("ready although the provider is revoked")
		}
		kms.set(func() { kms.down = nil })
		time.Sleep(10 * time.Second)
		g.mustOpen(t, "k", stored, "v")
	})
}

// TestOneProviderDown does not touch another.
func TestOneProviderDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newKMS(t, "a"), newKMS(t, "b")
		ga := newRing(t, a, nil).start(t)
		gb := newRing(t, b, func(c *RingConfig, _ *CacheConfig) { c.Cache = ga.cache }).start(t)
		both, err := NewSealer(SealerConfig{Prefix: "/", Write: ga.Ring, Read: []*Ring{gb.Ring, ga.Ring}, AllowPlaintextReads: true})
		if err != nil {
			t.Fatal(err)
		}
		va, vb := ga.mustSeal(t, "k", "va"), gb.mustSeal(t, "k", "vb")
		b.set(func() { b.down = kmsError("Status", kmsclient.KeyDisabled) })
		time.Sleep(time.Minute)
		if got, err := both.Open(context.Background(), []byte("k"), bytes.Clone(va)); err != nil || string(got) != "va" {
			t.Errorf("%q, %v", got, err)
		}
		_, err = both.Open(context.Background(), []byte("k"), bytes.Clone(vb))
		wantKind(t, err, KeyUnusable)
		if n := ga.cache.Len(); n != 1 {
			t.Errorf("%d seeds are left, want a's own", n)
		}
	})
}
