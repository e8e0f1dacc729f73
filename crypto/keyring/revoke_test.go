package keyring_test

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestUnusableKeyRevokesWithinTheInterval(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		foreign := kms.Encrypted(t, "k", "v")
		g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) {
			c.PollInterval, c.RevokeWithin = time.Hour, 5*time.Second
		}).Start(t)
		stored := g.MustWrite(t, "k", "v")
		g.MustRead(t, "k", foreign, "v")
		kms.Set(func() { kms.Down = ringtest.KMSError("Status", kmsclient.KeyDisabled) })
		time.Sleep(5 * time.Second)
		synctest.Wait()
		for range 3 { // and so it stays
			_, err := g.Write("k", "v")
			ringtest.WantKind(t, err, keyring.KeyUnusable)
			for _, part := range []string{`"/s/"`, `"ack"`, `"key-1"`, `"req-7"`, "disabled"} {
				if !strings.Contains(err.Error(), part) {
					t.Errorf("the text does not hold %s: %v", part, err)
				}
			}
			for _, v := range [][]byte{stored, foreign} {
				_, err = g.Read("k", v)
				ringtest.WantKind(t, err, keyring.KeyUnusable)
			}
			time.Sleep(time.Minute)
		}
		if n := g.Cache.Len(); n != 0 {
			t.Errorf("%d seeds are left in the cache", n)
		}
		if n := kms.Count("Decrypt"); n != 1 {
			t.Errorf("%d Decrypt calls: a revoked provider is not asked for values", n)
		}
		if st := g.State(); !st.Revoked || st.CanSeal || st.Healthy || g.Sealer.Health() == nil {
			t.Errorf("State = %+v", st)
		}
		if g.Events.Get("ack revoked") != 1 {
			t.Errorf("%d revocations were reported", g.Events.Get("ack revoked"))
		}
		// An outage on top does not lift it.
		kms.Set(func() { kms.Down = ringtest.KMSError("Status", kmsclient.Unreachable) })
		time.Sleep(time.Minute)
		_, err := g.Read("k", stored)
		ringtest.WantKind(t, err, keyring.KeyUnusable)
		// A good status does.
		kms.Set(func() { kms.Down = nil })
		time.Sleep(5 * time.Second)
		synctest.Wait()
		g.MustRead(t, "k", stored, "v")
		g.MustRead(t, "k", foreign, "v")
		g.MustRead(t, "k", g.MustWrite(t, "k", "w"), "w")
		if n := kms.Count("Encrypt"); n != 2 {
			t.Errorf("%d DEK seeds generated: after a revocation comes a new seed", n)
		}
	})
}

// whenBad is an Observer that does something as soon as a contact is said to have been bad, after
// which everybody sees it.
type whenBad struct {
	*ringtest.Events
	do func()
}

func (w *whenBad) Seed(provider string, event keyring.Event) {
	w.Events.Seed(provider, event)
	if event == keyring.EventBad {
		w.do()
	}
}

// TestNothingOpensOnceRevoked: from when a ring is said to be revoked its seeds are gone, and not a
// moment later, also where the key is.
func TestNothingOpensOnceRevoked(t *testing.T) {
	for name, cause := range map[string]error{"disabled": ringtest.KMSError("Status", kmsclient.KeyDisabled), "gone": ringtest.GoneError("Status")} {
		synctest.Test(t, func(t *testing.T) {
			kms := ringtest.NewKMS(t, "ack")
			foreign := kms.Encrypted(t, "k", "v")
			w := &whenBad{}
			g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) {
				w.Events, c.Observer = c.Observer.(*ringtest.Events), w
			})
			var all [][]byte
			bad := 0
			ended, cancel := context.WithCancel(t.Context())
			cancel()
			w.do = func() {
				bad++
				for _, stored := range all {
					if _, err := g.Sealer.Open(ended, nil, []byte("k"), bytes.Clone(stored)); err == nil {
						t.Errorf("%s: a value opens of a key that may not be used, revoked is %t", name, g.State().Revoked)
					}
				}
			}
			g.Start(t)
			all = [][]byte{g.MustWrite(t, "k", "v"), foreign}
			for _, stored := range all {
				g.MustRead(t, "k", stored, "v")
			}
			kms.Set(func() { kms.Down = cause })
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
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.RevokeWithin = 5 * time.Minute }).Start(t)
		stored := g.MustWrite(t, "k", "v")
		kms.Set(func() { kms.Down = ringtest.KMSError("Status", kmsclient.Denied) })
		time.Sleep(3 * time.Minute)
		g.MustRead(t, "k", stored, "v")
		g.MustWrite(t, "k", "v")
		kms.Set(func() { kms.Down = nil }) // it passes
		time.Sleep(2 * time.Minute)
		kms.Set(func() { kms.Down = ringtest.KMSError("Status", kmsclient.Denied) })
		time.Sleep(4 * time.Minute)
		g.MustRead(t, "k", stored, "v")
		time.Sleep(2*time.Minute + time.Second)
		_, err := g.Read("k", stored)
		ringtest.WantKind(t, err, keyring.KeyUnusable)
		_, err = g.Write("k", "v")
		ringtest.WantKind(t, err, keyring.KeyUnusable)
		if !strings.Contains(err.Error(), "denies") {
			t.Error(err)
		}
		kms.Set(func() { kms.Down = nil })
		time.Sleep(10 * time.Second)
		g.MustRead(t, "k", stored, "v")
		g.MustWrite(t, "k", "v")
	})
}

// TestDenialAtStart: there is no seed to lose, and the client hears that an operator has to act.
func TestDenialAtStart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		kms.Down = ringtest.KMSError("Status", kmsclient.Denied)
		g := ringtest.NewRig(t, kms, nil).Start(t)
		synctest.Wait()
		_, err := g.Write("k", "v")
		ringtest.WantKind(t, err, keyring.KeyUnusable)
	})
}

// TestStatusSaysNothingOfTheKey: Status is answered as ever, and what the key is for is refused:
// reads and writes end as if Status had said so.
func TestStatusSaysNothingOfTheKey(t *testing.T) {
	for _, reason := range []kmsclient.Reason{kmsclient.KeyDisabled, kmsclient.Denied} {
		for name, ops := range map[string][]string{"all": {"Encrypt", "Decrypt"}, "Decrypt alone": {"Decrypt"}} {
			t.Run(fmt.Sprintf("%v %s", reason, name), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					kms := ringtest.NewKMS(t, "ack")
					foreign := kms.Encrypted(t, "k", "v")
					g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) {
						c.PollInterval, c.RevokeWithin = time.Hour, 5*time.Second
					}).Start(t)
					stored := g.MustWrite(t, "k", "v")
					g.MustRead(t, "k", foreign, "v")
					refuse := func() {
						for _, op := range ops {
							kms.OpErr[op] = ringtest.KMSError(op, reason)
						}
					}
					kms.Set(refuse)
					if reason == kmsclient.Denied { // it may pass
						time.Sleep(5 * time.Second)
						g.MustRead(t, "k", stored, "v")
						g.MustWrite(t, "k", "v")
						kms.Set(func() { kms.OpErr = map[string]error{} })
						time.Sleep(10 * time.Second)
						kms.Set(refuse)
						time.Sleep(5 * time.Second)
					}
					time.Sleep(5 * time.Second)
					synctest.Wait()
					for range 3 { // and so it stays
						_, err := g.Write("k", "v")
						ringtest.WantKind(t, err, keyring.KeyUnusable)
						for _, v := range [][]byte{stored, foreign} {
							_, err = g.Read("k", v)
							ringtest.WantKind(t, err, keyring.KeyUnusable)
						}
						time.Sleep(time.Minute)
					}
					if n := g.Cache.Len(); n != 0 || !g.State().Revoked || g.Sealer.Health() == nil {
						t.Errorf("%d seeds are left, %+v, ready: %v", n, g.State(), g.Sealer.Health())
					}
					kms.Set(func() { kms.OpErr = map[string]error{} })
					time.Sleep(5 * time.Second)
					synctest.Wait()
					g.MustRead(t, "k", stored, "v")
					g.MustRead(t, "k", g.MustWrite(t, "k", "w"), "w")
				})
			})
		}
	}
}

// TestNothingIsSealedThatDoesNotOpen: the KMS wraps, and does not unwrap or not to the same. So it
// was from the start, or it begins at the next seed.
func TestNothingIsSealedThatDoesNotOpen(t *testing.T) {
	for name, c := range map[string]struct {
		fault func(*ringtest.KMS)
		want  keyring.Kind
	}{
		"denied":      {func(k *ringtest.KMS) { k.OpErr["Decrypt"] = ringtest.KMSError("Decrypt", kmsclient.Denied) }, keyring.KeyUnusable},
		"unavailable": {func(k *ringtest.KMS) { k.OpErr["Decrypt"] = ringtest.KMSError("Decrypt", kmsclient.Unreachable) }, keyring.Unavailable},
		"invalid":     {func(k *ringtest.KMS) { k.OpErr["Decrypt"] = ringtest.KMSError("Decrypt", kmsclient.Invalid) }, keyring.Unavailable},
		"another":     {func(k *ringtest.KMS) { k.Result = func(b []byte) []byte { return bytes.Repeat([]byte{1}, 32) } }, keyring.Unavailable},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				kms := ringtest.NewKMS(t, "ack")
				c.fault(kms)
				g := ringtest.NewRig(t, kms, nil).Start(t)
				synctest.Wait()
				_, err := g.Write("k", "v")
				ringtest.WantKind(t, err, c.want)
				if g.Sealer.Health() == nil || g.State().CanSeal {
					t.Errorf("ready, %+v", g.State())
				}
				kms.Set(func() { kms.OpErr, kms.Result = map[string]error{}, nil })
				time.Sleep(10 * time.Second)
				g.MustRead(t, "k", g.MustWrite(t, "k", "v"), "v")
			})
		})
	}
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		first := ringtest.KeyIDOf(t, g.MustWrite(t, "k", "v"))
		// The key behind the ID is another one: the next seed is of that.
		kms.Rotate(first)
		time.Sleep(time.Minute)
		synctest.Wait()
		stored := g.MustWrite(t, "k", "v")
		if n := kms.Count("Encrypt"); n != 2 {
			t.Errorf("%d DEK seeds generated", n)
		}
		ringtest.NewRig(t, kms, nil).Start(t).MustRead(t, "k", stored, "v")
		// It breaks: the seed in use is one that will not open, and there is no other.
		for _, fault := range []func(){
			func() { kms.OpErr["Decrypt"] = ringtest.KMSError("Decrypt", kmsclient.Invalid) },
			func() { kms.Result = func(b []byte) []byte { return bytes.Repeat([]byte{1}, len(b)) } },
		} {
			kms.Set(fault)
			time.Sleep(time.Minute)
			synctest.Wait()
			_, err := g.Write("k", "v")
			ringtest.WantKind(t, err, keyring.Unavailable)
			g.MustRead(t, "k", stored, "v")
			kms.Set(func() { kms.OpErr, kms.Result = map[string]error{}, nil })
			time.Sleep(10 * time.Second)
			synctest.Wait()
			g.MustWrite(t, "k", "v")
		}
	})
}

// TestStoredValuesCannotRevoke: who can write to etcd can name any key there; that must neither
// take the provider down nor make it call the KMS without end.
func TestStoredValuesCannotRevoke(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		good := kms.Encrypted(t, "k", "v")
		kms.Rotate("key-gone")
		bad := kms.Encrypted(t, "k", "v")
		kms.Rotate("key-now")
		kms.Set(func() { delete(kms.Keys, "key-gone") })
		g := ringtest.NewRig(t, kms, nil).Start(t)
		own := g.MustWrite(t, "k", "own")
		g.MustRead(t, "k", good, "v")
		kms.Set(func() { kms.Calls = map[string]int{} })
		for range 600 {
			_, err := g.Read("k", bad)
			ringtest.WantKind(t, err, keyring.KeyUnusable)
			g.MustRead(t, "k", good, "v")
			g.MustRead(t, "k", own, "own")
			g.MustWrite(t, "k", "v")
			time.Sleep(time.Second)
		}
		if n := kms.Count("Status"); n > 75 {
			t.Errorf("%d Status calls in ten minutes", n)
		}
		if n := kms.Count("Encrypt"); n != 0 {
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
				kms := ringtest.NewKMS(t, "ack")
				g := ringtest.NewRig(t, kms, nil).Start(t)
				old := g.MustWrite(t, "k", "old")
				kms.Rotate("key-2")
				time.Sleep(time.Minute)
				synctest.Wait()
				now := g.MustWrite(t, "k", "now")
				kms.Set(func() { kms.KeyErr["key-1"] = ringtest.KMSError("Decrypt", reason) })
				time.Sleep(time.Minute)
				if reason == kmsclient.Denied {
					g.MustRead(t, "k", old, "old")
					time.Sleep(2 * time.Minute)
				}
				synctest.Wait()
				_, err := g.Read("k", old)
				ringtest.WantKind(t, err, keyring.KeyUnusable)
				g.MustRead(t, "k", now, "now")
				g.MustWrite(t, "k", "v")
				kms.Set(func() { kms.KeyErr = map[string]error{} })
				time.Sleep(5 * time.Second) // the refusal is remembered
				g.MustRead(t, "k", old, "old")
			})
		})
	}
}

// TestUnwrapDuringRevocation: an answer from before the revocation does not bring a seed into the
// cache after it.
func TestUnwrapDuringRevocation(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		stored := kms.Encrypted(t, "k", "v")
		slow := &slowDecrypt{KMS: kms, release: make(chan struct{})}
		g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.KMS, c.Timeout = slow, time.Hour }).Start(t)
		synctest.Wait()
		done := make(chan error)
		go func() { _, err := g.Read("k", stored); done <- err }()
		synctest.Wait()
		kms.Set(func() { kms.OpErr["Status"] = ringtest.KMSError("Status", kmsclient.KeyDisabled) })
		time.Sleep(time.Minute)
		synctest.Wait()
		close(slow.release)
		if err := <-done; err == nil {
			t.Error("opened with an answer from before the revocation")
		}
		if n := g.Cache.Len(); n != 0 {
			t.Errorf("%d seeds in the cache of a revoked provider", n)
		}
	})
}

// TestReadOnlyRing never generates a DEK seed; it decrypts, and is revoked like any other.
func TestReadOnlyRing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "old")
		kms.OpErr["Encrypt"] = ringtest.KMSError("Encrypt", kmsclient.Denied)
		stored := kms.Encrypted(t, "k", "v")
		g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.ReadOnly = true }).Start(t)
		g.MustRead(t, "k", stored, "v")
		time.Sleep(time.Hour)
		if n := kms.Count("Encrypt"); n != 0 || !g.State().Healthy || g.Sealer.Health() != nil {
			t.Errorf("%d DEK seeds generated, %+v, %v", n, g.State(), g.Sealer.Health())
		}
		// Status is answered as ever
		kms.Set(func() { kms.OpErr["Decrypt"] = ringtest.KMSError("Decrypt", kmsclient.Denied) })
		time.Sleep(2 * time.Minute)
		for range 3 { // with the last seed gone from the cache
			_, err := g.Read("k", stored)
			ringtest.WantKind(t, err, keyring.KeyUnusable)
			if !g.State().Revoked || g.Sealer.Health() == nil {
				t.Errorf("%+v", g.State())
			}
			time.Sleep(time.Minute)
		}
		kms.Set(func() { delete(kms.OpErr, "Decrypt") })
		time.Sleep(10 * time.Second)
		g.MustRead(t, "k", stored, "v")
		if _, err := rule.New(rule.Config{Write: g.Ring}); err == nil {
			t.Error("a read-only ring was taken for writing")
		}
		kms.Set(func() { kms.Down = ringtest.KMSError("Status", kmsclient.KeyDisabled) })
		time.Sleep(time.Minute)
		_, err := g.Read("k", stored)
		ringtest.WantKind(t, err, keyring.KeyUnusable)
		if g.Sealer.Health() == nil {
			t.Error("ready although the provider is revoked")
		}
		kms.Set(func() { kms.Down = nil })
		time.Sleep(10 * time.Second)
		g.MustRead(t, "k", stored, "v")
	})
}

// TestOneProviderDown does not touch another.
func TestOneProviderDown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := ringtest.NewKMS(t, "a"), ringtest.NewKMS(t, "b")
		ga := ringtest.NewRig(t, a, nil).Start(t)
		gb := ringtest.NewRig(t, b, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.Cache = ga.Cache }).Start(t)
		both, err := rule.New(rule.Config{Prefix: "/", Write: ga.Ring, Read: []*keyring.Ring{gb.Ring, ga.Ring}, AllowPlaintextReads: true})
		if err != nil {
			t.Fatal(err)
		}
		va, vb := ga.MustWrite(t, "k", "va"), gb.MustWrite(t, "k", "vb")
		b.Set(func() { b.Down = ringtest.KMSError("Status", kmsclient.KeyDisabled) })
		time.Sleep(time.Minute)
		if got, err := both.Open(context.Background(), nil, []byte("k"), bytes.Clone(va)); err != nil || string(got) != "va" {
			t.Errorf("%q, %v", got, err)
		}
		_, err = both.Open(context.Background(), nil, []byte("k"), bytes.Clone(vb))
		ringtest.WantKind(t, err, keyring.KeyUnusable)
		if n := ga.Cache.Len(); n != 1 {
			t.Errorf("%d seeds are left, want a's own", n)
		}
	})
}
