package keyring

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// versions makes the ring take all of "key/version" for one key.
func versions(c *RingConfig, _ *CacheConfig) {
	c.KeyOf = func(id string) string { key, _, _ := strings.Cut(id, "/"); return key }
}

// TestIdleCalls: a poll asks for the status and unwraps one seed of each key, however many versions
// of it are in the cache, with the default intervals.
func TestIdleCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		g := newRing(t, kms, versions).start(t)
		g.mustSeal(t, "k", "v")
		for _, key := range []string{"old", "now"} {
			for v := range 10 {
				kms.rotate(fmt.Sprintf("%s/%d", key, v))
				time.Sleep(time.Minute)
				synctest.Wait()
				g.mustOpen(t, "k", g.mustSeal(t, "k", "v"), "v")
			}
		}
		kms.set(func() { kms.calls = map[string]int{} })
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		status, probes := kms.count("Status"), kms.count("Probe")
		if status < 10 || status > 12 {
			t.Errorf("%d Status calls in ten minutes", status)
		}
		if want := 3 * status; probes != want { // of key-1, old and now
			t.Errorf("%d Decrypt calls in %d polls, want %d", probes, status, want)
		}
		if n := kms.count("Encrypt") + kms.count("Decrypt"); n != 0 {
			t.Errorf("%d calls that nobody asked for", n)
		}
	})
}

// TestOldKeyOfManyIsRevoked: every key ID in the cache has its turn, though there are more than one
// poll asks about.
func TestOldKeyOfManyIsRevoked(t *testing.T) {
	for _, which := range []int{0, 1, maxProbes - 1, maxProbes, 2*maxProbes + 2} {
		for _, reason := range []kmsclient.Reason{kmsclient.KeyDisabled, kmsclient.Denied} {
			t.Run(fmt.Sprintf("%v of number %d", reason, which), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					kms := newKMS(t, "ack")
					g := newRing(t, kms, func(c *RingConfig, _ *CacheConfig) { c.RevokeWithin = 10 * time.Second }).start(t)
					var stored [][]byte
					for i := range 2*maxProbes + 3 {
						kms.rotate(fmt.Sprintf("old-%03d", i))
						v := kms.sealed(t, "k", "v")
						g.mustOpen(t, "k", v, "v")
						stored = append(stored, v)
					}
					kms.rotate("now")
					time.Sleep(10 * time.Second)
					own := g.mustSeal(t, "k", "own")
					id := fmt.Sprintf("old-%03d", which)
					kms.set(func() {
						kms.keyErr[id] = kmsError("Decrypt", reason)
						// that is no reason to leave the others for later
						for odd := 5; odd < 2*maxProbes; odd += 10 {
							kms.keyErr[fmt.Sprintf("old-%03d", odd)] = &kmsclient.Error{Op: "Decrypt", Reason: kmsclient.Failing}
						}
					})
					time.Sleep(3 * 10 * time.Second) // a third of the keys each
					if reason == kmsclient.Denied {
						time.Sleep(3 * 10 * time.Second)
					}
					synctest.Wait()
					for i, v := range stored {
						_, err := g.open("k", v)
						if i == which {
							wantKind(t, err, KeyUnusable)
						} else if err != nil {
							t.Fatal(err)
						}
					}
					g.mustOpen(t, "k", own, "own")
					g.mustSeal(t, "k", "v")
				})
			})
		}
	}
}

// TestOldKeyGoesWithAllVersions: one seed is asked about, and all of the key's go.
func TestOldKeyGoesWithAllVersions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		g := newRing(t, kms, versions).start(t)
		var stored [][]byte
		for v := range 5 {
			kms.rotate(fmt.Sprintf("old/%d", v))
			time.Sleep(time.Minute)
			synctest.Wait()
			stored = append(stored, g.mustSeal(t, "k", "v"))
		}
		kms.rotate("now/1")
		time.Sleep(time.Minute)
		synctest.Wait()
		own := g.mustSeal(t, "k", "own")
		kms.set(func() {
			for v := range 5 {
				kms.keyErr[fmt.Sprintf("old/%d", v)] = kmsError("Decrypt", kmsclient.KeyDisabled)
			}
		})
		time.Sleep(time.Minute)
		synctest.Wait()
		// what opens now is cached
		kms.set(func() { kms.down = kmsError("Decrypt", kmsclient.Unreachable) })
		for _, v := range stored {
			if _, err := g.open("k", v); err == nil {
				t.Errorf("a value under %s opens", keyIDOf(t, v))
			}
		}
		g.mustOpen(t, "k", own, "own")
	})
}

// TestRefusalBesideAnotherFault: something else keeps contacts from being good, and the KMS says no
// to what is in use. Old keys are asked about only while Status is good.
func TestRefusalBesideAnotherFault(t *testing.T) {
	for name, op := range map[string]string{"no status": "Status", "no new seed": "Encrypt"} {
		for _, reason := range []kmsclient.Reason{kmsclient.KeyDisabled, kmsclient.Denied} {
			t.Run(fmt.Sprintf("%s, %v", name, reason), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					kms := newKMS(t, "ack")
					g := newRing(t, kms, func(c *RingConfig, _ *CacheConfig) { c.MaxAge, c.SealUnreachableFor = time.Hour, 24*time.Hour }).start(t)
					old := g.mustSeal(t, "k", "v")
					kms.rotate("key-2")
					time.Sleep(time.Minute)
					synctest.Wait()
					now := g.mustSeal(t, "k", "v")
					kms.set(func() { kms.opErr[op] = kmsError(op, kmsclient.Unreachable) })
					time.Sleep(time.Hour)
					g.mustSeal(t, "k", "v")
					g.mustOpen(t, "k", old, "v")
					kms.set(func() { kms.keyErr["key-1"] = kmsError("Decrypt", reason) })
					time.Sleep(3*time.Minute + 10*time.Second) // two polls or three
					_, err := g.open("k", old)
					if op == "Status" {
						if err != nil {
							t.Errorf("an old key was asked about while Status was not good: %v", err)
						}
					} else {
						wantKind(t, err, KeyUnusable)
					}
					g.mustOpen(t, "k", now, "v")
					kms.set(func() { kms.keyErr["key-2"] = kmsError("Decrypt", reason) })
					time.Sleep(2*time.Minute + 10*time.Second)
					_, err = g.open("k", now)
					wantKind(t, err, KeyUnusable)
					_, err = g.seal("k", "v")
					wantKind(t, err, KeyUnusable)
				})
			})
		}
	}
}

// TestAliasLeadsNowhere: it ends sealing. What the key itself unwraps is opened, cached or not,
// until the key itself may not be used.
func TestAliasLeadsNowhere(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		nowhere := &kmsclient.Error{Op: "Status", Reason: kmsclient.AliasNotFound, Code: "Forbidden.AliasNotFound"}
		kms := newKMS(t, "ack")
		cold, late := kms.sealed(t, "k", "cold"), kms.sealed(t, "k", "late")
		g := newRing(t, kms, nil).start(t)
		stored := g.mustSeal(t, "k", "v")
		kms.set(func() { kms.opErr["Status"] = nowhere })
		time.Sleep(time.Minute)
		synctest.Wait()
		for range 10 {
			_, err := g.seal("k", "v")
			wantKind(t, err, KeyUnusable)
			if !strings.Contains(err.Error(), "Forbidden.AliasNotFound") {
				t.Error(err)
			}
			g.mustOpen(t, "k", stored, "v")
			g.mustOpen(t, "k", cold, "cold")
			time.Sleep(time.Minute)
		}
		if g.State().Revoked || g.State().CanSeal || g.sealer.Health() == nil {
			t.Errorf("%+v", g.State())
		}
		kms.set(func() { kms.keyErr["key-1"] = kmsError("Decrypt", kmsclient.KeyDisabled) })
		time.Sleep(time.Minute)
		synctest.Wait()
		for _, v := range [][]byte{stored, cold, late} {
			_, err := g.open("k", v)
			wantKind(t, err, KeyUnusable)
		}
		kms.set(func() { kms.opErr, kms.keyErr = map[string]error{}, map[string]error{} })
		time.Sleep(10 * time.Second)
		synctest.Wait()
		g.mustSeal(t, "k", "v")
		g.mustOpen(t, "k", late, "late")
	})
}
