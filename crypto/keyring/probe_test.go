package keyring_test

import (
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// versions makes the ring take all of "key/version" for one key.
func versions(c *keyring.RingConfig, _ *keyring.CacheConfig) {
	c.KeyOf = func(id string) string { key, _, _ := strings.Cut(id, "/"); return key }
}

// TestIdleCalls: a poll asks for the status and unwraps one seed of each key, however many versions
// of it are in the cache, with the default intervals.
func TestIdleCalls(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, versions).Start(t)
		g.MustWrite(t, "k", "v")
		for _, key := range []string{"old", "now"} {
			for v := range 10 {
				kms.Rotate(fmt.Sprintf("%s/%d", key, v))
				time.Sleep(time.Minute)
				synctest.Wait()
				g.MustRead(t, "k", g.MustWrite(t, "k", "v"), "v")
			}
		}
		kms.Set(func() { kms.Calls = map[string]int{} })
		time.Sleep(10 * time.Minute)
		synctest.Wait()
		status, probes := kms.Count("Status"), kms.Count("Probe")
		if status < 10 || status > 12 {
			t.Errorf("%d Status calls in ten minutes", status)
		}
		if want := 3 * status; probes != want { // of key-1, old and now
			t.Errorf("%d Decrypt calls in %d polls, want %d", probes, status, want)
		}
		if n := kms.Count("Encrypt") + kms.Count("Decrypt"); n != 0 {
			t.Errorf("%d calls that nobody asked for", n)
		}
	})
}

// TestOldKeyOfManyIsRevoked: every key ID in the cache has its turn, though there are more than one
// poll asks about.
func TestOldKeyOfManyIsRevoked(t *testing.T) {
	for _, which := range []int{0, 1, keyring.MaxProbes - 1, keyring.MaxProbes, 2*keyring.MaxProbes + 2} {
		for _, reason := range []kmsclient.Reason{kmsclient.KeyDisabled, kmsclient.Denied} {
			t.Run(fmt.Sprintf("%v of number %d", reason, which), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					kms := ringtest.NewKMS(t, "ack")
					g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.RevokeWithin = 10 * time.Second }).Start(t)
					var stored [][]byte
					for i := range 2*keyring.MaxProbes + 3 {
						kms.Rotate(fmt.Sprintf("old-%03d", i))
						v := kms.Encrypted(t, "k", "v")
						g.MustRead(t, "k", v, "v")
						stored = append(stored, v)
					}
					kms.Rotate("now")
					time.Sleep(10 * time.Second)
					own := g.MustWrite(t, "k", "own")
					id := fmt.Sprintf("old-%03d", which)
					kms.Set(func() {
						kms.KeyErr[id] = ringtest.KMSError("Decrypt", reason)
						// that is no reason to leave the others for later
						for odd := 5; odd < 2*keyring.MaxProbes; odd += 10 {
							kms.KeyErr[fmt.Sprintf("old-%03d", odd)] = &kmsclient.Error{Op: "Decrypt", Reason: kmsclient.Failing}
						}
					})
					time.Sleep(3 * 10 * time.Second) // a third of the keys each
					if reason == kmsclient.Denied {
						time.Sleep(3 * 10 * time.Second)
					}
					synctest.Wait()
					for i, v := range stored {
						_, err := g.Read("k", v)
						if i == which {
							ringtest.WantKind(t, err, keyring.KeyUnusable)
						} else if err != nil {
							t.Fatal(err)
						}
					}
					g.MustRead(t, "k", own, "own")
					g.MustWrite(t, "k", "v")
				})
			})
		}
	}
}

// TestOldKeyGoesWithAllVersions: one seed is asked about, and all of the key's go.
func TestOldKeyGoesWithAllVersions(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, versions).Start(t)
		var stored [][]byte
		for v := range 5 {
			kms.Rotate(fmt.Sprintf("old/%d", v))
			time.Sleep(time.Minute)
			synctest.Wait()
			stored = append(stored, g.MustWrite(t, "k", "v"))
		}
		kms.Rotate("now/1")
		time.Sleep(time.Minute)
		synctest.Wait()
		own := g.MustWrite(t, "k", "own")
		kms.Set(func() {
			for v := range 5 {
				kms.KeyErr[fmt.Sprintf("old/%d", v)] = ringtest.KMSError("Decrypt", kmsclient.KeyDisabled)
			}
		})
		time.Sleep(time.Minute)
		synctest.Wait()
		// what opens now is cached
		kms.Set(func() { kms.Down = ringtest.KMSError("Decrypt", kmsclient.Unreachable) })
		for _, v := range stored {
			if _, err := g.Read("k", v); err == nil {
				t.Errorf("a value under %s opens", ringtest.KeyIDOf(t, v))
			}
		}
		g.MustRead(t, "k", own, "own")
	})
}

// TestRefusalBesideAnotherFault: something else keeps contacts from being good, and the KMS says no
// to what is in use. Old keys are asked about only while Status is good.
func TestRefusalBesideAnotherFault(t *testing.T) {
	for name, op := range map[string]string{"no status": "Status", "no new seed": "Encrypt"} {
		for _, reason := range []kmsclient.Reason{kmsclient.KeyDisabled, kmsclient.Denied} {
			t.Run(fmt.Sprintf("%s, %v", name, reason), func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					kms := ringtest.NewKMS(t, "ack")
					g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, _ *keyring.CacheConfig) {
						c.MaxAge, c.SealUnreachableFor = time.Hour, 24*time.Hour
					}).Start(t)
					old := g.MustWrite(t, "k", "v")
					kms.Rotate("key-2")
					time.Sleep(time.Minute)
					synctest.Wait()
					now := g.MustWrite(t, "k", "v")
					kms.Set(func() { kms.OpErr[op] = ringtest.KMSError(op, kmsclient.Unreachable) })
					time.Sleep(time.Hour)
					g.MustWrite(t, "k", "v")
					g.MustRead(t, "k", old, "v")
					kms.Set(func() { kms.KeyErr["key-1"] = ringtest.KMSError("Decrypt", reason) })
					time.Sleep(3*time.Minute + 10*time.Second) // two polls or three
					_, err := g.Read("k", old)
					if op == "Status" {
						if err != nil {
							t.Errorf("an old key was asked about while Status was not good: %v", err)
						}
					} else {
						ringtest.WantKind(t, err, keyring.KeyUnusable)
					}
					g.MustRead(t, "k", now, "v")
					kms.Set(func() { kms.KeyErr["key-2"] = ringtest.KMSError("Decrypt", reason) })
					time.Sleep(2*time.Minute + 10*time.Second)
					_, err = g.Read("k", now)
					ringtest.WantKind(t, err, keyring.KeyUnusable)
					_, err = g.Write("k", "v")
					ringtest.WantKind(t, err, keyring.KeyUnusable)
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
		kms := ringtest.NewKMS(t, "ack")
		cold, late := kms.Encrypted(t, "k", "cold"), kms.Encrypted(t, "k", "late")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		stored := g.MustWrite(t, "k", "v")
		kms.Set(func() { kms.OpErr["Status"] = nowhere })
		time.Sleep(time.Minute)
		synctest.Wait()
		for range 10 {
			_, err := g.Write("k", "v")
			ringtest.WantKind(t, err, keyring.KeyUnusable)
			if !strings.Contains(err.Error(), "Forbidden.AliasNotFound") {
				t.Error(err)
			}
			g.MustRead(t, "k", stored, "v")
			g.MustRead(t, "k", cold, "cold")
			time.Sleep(time.Minute)
		}
		if g.State().Revoked || g.State().CanSeal || g.Sealer.Health() == nil {
			t.Errorf("%+v", g.State())
		}
		kms.Set(func() { kms.KeyErr["key-1"] = ringtest.KMSError("Decrypt", kmsclient.KeyDisabled) })
		time.Sleep(time.Minute)
		synctest.Wait()
		for _, v := range [][]byte{stored, cold, late} {
			_, err := g.Read("k", v)
			ringtest.WantKind(t, err, keyring.KeyUnusable)
		}
		kms.Set(func() { kms.OpErr, kms.KeyErr = map[string]error{}, map[string]error{} })
		time.Sleep(10 * time.Second)
		synctest.Wait()
		g.MustWrite(t, "k", "v")
		g.MustRead(t, "k", late, "late")
	})
}
