package keyring

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestSeedsAreCopied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		s := newSite(t, ack, dr, false, nil).start(t)
		stored := s.ack.mustSeal(t, "k", "v")
		h := headerOf(t, stored)
		c, err := envelope.ParseCopy(h.Annotations[drCopy])
		if err != nil || c.KeyID != "key-1" || len(h.Annotations) != 2 {
			t.Fatalf("%+v, %v", h, err)
		}
		s.ack.mustOpen(t, "k", stored, "v")
		// A proxy that knows nothing of recovery reads it with the provider's own key, and so does
		// one that knows all.
		for _, g := range []*rig{newRing(t, ack, nil).start(t), newSite(t, ack, dr, false, nil).start(t).ack} {
			g.mustOpen(t, "k", stored, "v")
		}
		if ack.count("Decrypt") != 2 || dr.count("Decrypt") != 0 || dr.count("Encrypt") != 2 {
			t.Errorf("ack unwrapped %d times, dr %d; dr wrapped %d times", ack.count("Decrypt"), dr.count("Decrypt"), dr.count("Encrypt"))
		}
		if s.events.get("ack by dr") != 0 || standing(t, s.sealer, "k", stored) != Current {
			t.Error("a copy was used although all is well")
		}
		if st := s.ack.Recovery(); len(st) != 1 || st[0] != (RecoveryState{Provider: "dr"}) {
			t.Errorf("%+v", st)
		}
	})
}

// TestPrimaryIsGoneForGood is the whole life: the key is lost, everything reads by the copies, and
// the rule moves to a new provider.
func TestPrimaryIsGoneForGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		s := newSite(t, ack, dr, false, nil).start(t)
		stored := s.ack.mustSeal(t, "k", "v")
		bare := ack.sealed(t, "k", "no copy")
		ack.set(func() { ack.down = goneError("Status") })
		time.Sleep(time.Minute)
		synctest.Wait()
		ack.set(func() { ack.calls = map[string]int{} })
		for range 100 {
			s.ack.mustOpen(t, "k", stored, "v")
		}
		if ack.count("Decrypt") != 0 || dr.count("Decrypt") != 1 || s.events.get("ack by dr") != 100 {
			t.Errorf("ack unwrapped %d, dr %d times; %d uses", ack.count("Decrypt"), dr.count("Decrypt"), s.events.get("ack by dr"))
		}
		if n := s.events.get("rescue ack by dr key-1: true"); n != 1 {
			t.Errorf("one seed was unwrapped, and %d are told of", n)
		}
		_, err := s.ack.seal("k", "v")
		wantKind(t, err, KeyUnusable)
		_, err = s.ack.open("k", bare)
		wantKind(t, err, KeyUnusable)
		if st := s.ack.Recovery(); len(st) != 1 || st[0].Used.IsZero() {
			t.Errorf("%+v", st)
		}
		for range 60 {
			time.Sleep(time.Minute)
			s.ack.mustOpen(t, "k", stored, "v")
		}
		if n := strings.Count(s.log.String(), "values are decrypted by recovery copies"); n != 2 {
			t.Errorf("the log says so %d times in an hour:\n%s", n, s.log)
		}
		if n := dr.count("Decrypt"); n != 1 {
			t.Errorf("dr unwrapped %d times: what it gave goes at each poll", n)
		}
		if got := standing(t, s.sealer, "k", stored); got != Stale {
			t.Errorf("a value opened by a copy is %v", got)
		}

		// After a restart, with a new provider.
		fresh := newKMS(t, "new")
		s = newSite(t, ack, dr, false, nil)
		g := newRing(t, fresh, func(c *RingConfig, _ *CacheConfig) { c.Cache = s.ack.cache })
		if err := errors.Join(g.SetRecovery([]*Ring{s.dr.Ring}, false), s.ack.SetRecovery(nil, false)); err != nil {
			t.Fatal(err)
		}
		g.start(t)
		s.start(t)
		for name, moved := range map[string]*Sealer{
			"recovery": rule(t, SealerConfig{Write: g.Ring, Read: []*Ring{s.ack.Ring}, Recovery: []*Ring{s.dr.Ring}}),
			"readWith": rule(t, SealerConfig{Read: []*Ring{s.ack.Ring, s.dr.Ring}}),
			"writer":   rule(t, SealerConfig{Write: g.Ring, Read: []*Ring{s.dr.Ring, s.ack.Ring}}),
		} {
			if got, err := openBy(moved, "k", stored); err != nil || got != "v" {
				t.Errorf("%s: %q, %v", name, got, err)
			}
			if got := standing(t, moved, "k", stored); got != Stale {
				t.Errorf("%s: it is %v", name, got)
			}
		}
		again := g.mustSeal(t, "k", "v")
		if got := standing(t, rule(t, SealerConfig{Write: g.Ring, Recovery: []*Ring{s.dr.Ring}}), "k", again); got != Current {
			t.Errorf("the rewritten value is %v", got)
		}
		if _, ok := headerOf(t, again).Annotations[drCopy]; !ok {
			t.Error("the rewritten value has no copy")
		}
		// The key comes back: it is used again, and what it opens counts as such.
		ack.set(func() { ack.down, ack.calls = nil, map[string]int{} })
		time.Sleep(10 * time.Second)
		synctest.Wait()
		n := s.events.get("ack by dr")
		s.ack.mustOpen(t, "k", stored, "v")
		if ack.count("Decrypt") != 1 || s.events.get("ack by dr") != n {
			t.Error("the key is back, and a copy was used")
		}
	})
}

// TestOneVersionIsGone: the provider works, and one of its old keys is lost.
func TestOneVersionIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		s := newSite(t, ack, dr, false, nil).start(t)
		stored := s.ack.mustSeal(t, "k", "v")
		ack.rotate("key-2")
		ack.set(func() { ack.keyErr["key-1"] = goneError("Decrypt") })
		s.stop()
		s = newSite(t, ack, dr, false, nil).start(t)
		ack.set(func() { ack.calls = map[string]int{} })
		dr.set(func() { dr.calls = map[string]int{} })
		for range 120 {
			s.ack.mustOpen(t, "k", stored, "v")
			time.Sleep(time.Minute)
		}
		if ack.count("Decrypt") != 1 || dr.count("Decrypt") != 1 || ack.count("Encrypt") > 1 {
			t.Errorf("ack unwrapped %d and wrapped %d, dr unwrapped %d times in two hours", ack.count("Decrypt"), ack.count("Encrypt"), dr.count("Decrypt"))
		}
		s.ack.mustOpen(t, "k", s.ack.mustSeal(t, "k", "w"), "w")
	})
}

// TestRefusalIsNotRecovered: who disables a key, or takes the permission away, ends its use, copies
// or not.
func TestRefusalIsNotRecovered(t *testing.T) {
	for reason, within := range map[kmsclient.Reason]time.Duration{kmsclient.KeyDisabled: time.Minute, kmsclient.Denied: 3 * time.Minute} {
		t.Run(reason.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
				s := newSite(t, ack, dr, false, nil).start(t)
				stored := s.ack.mustSeal(t, "k", "v")
				refuse := func() {
					t.Helper()
					_, err := s.ack.open("k", stored)
					wantKind(t, err, KeyUnusable)
				}
				ack.set(func() { ack.down = kmsError("Status", reason) })
				time.Sleep(within)
				refuse()
				// does not lift it
				ack.set(func() { ack.down = kmsError("Status", kmsclient.Unreachable) })
				time.Sleep(time.Minute)
				refuse()
				if dr.count("Decrypt") != 0 {
					t.Error("a copy was unwrapped")
				}
				// A key that is gone and then there again, but disabled: what the copies gave goes
				// too.
				ack.set(func() { ack.down = goneError("Status") })
				time.Sleep(time.Minute)
				s.ack.mustOpen(t, "k", stored, "v")
				ack.set(func() { ack.down = kmsError("Status", reason) })
				time.Sleep(within)
				refuse()
				if n := s.ack.cache.Len(); n != 0 {
					t.Errorf("%d seeds are left", n)
				}
				// With the seed cold, from the start.
				s = newSite(t, ack, dr, false, nil).start(t)
				time.Sleep(within)
				refuse()
				// Only the value's own key, which is not the current one.
				ack.set(func() { ack.down = nil; ack.keyErr["key-1"] = kmsError("Decrypt", reason) })
				ack.rotate("key-2")
				s = newSite(t, ack, dr, false, nil).start(t)
				refuse()
				if n := dr.count("Decrypt"); n != 1 {
					t.Errorf("%d copies were unwrapped", n)
				}
			})
		})
	}
}

// TestNonBlockingDecidesNothing: a caller that does not wait gets ErrWouldBlock where a copy might
// still open the value, and not that it is lost; a rule that hands lost values on does not do it
// then.
func TestNonBlockingDecidesNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		s := newSite(t, ack, dr, false, nil).start(t)
		stored := s.ack.mustSeal(t, "k", "v")
		ack.set(func() { ack.down = goneError("Status") })
		time.Sleep(time.Minute)
		synctest.Wait()
		ended, end := context.WithCancel(t.Context())
		end()
		for _, pass := range []bool{false, true} {
			counts := &events{}
			sealer := rule(t, SealerConfig{Write: s.ack.Ring, Recovery: []*Ring{s.dr.Ring}, Passthrough: pass, Observer: counts})
			got, err := sealer.Open(ended, []byte("k"), bytes.Clone(stored))
			if got != nil {
				t.Errorf("passthrough %t: %d bytes were handed on", pass, len(got))
			}
			wantKind(t, err, Unavailable)
			if len(counts.counts) != 0 {
				t.Errorf("passthrough %t: what nobody was told is counted: %v", pass, counts.counts)
			}
		}
		// With time, the copy opens it; from then on it takes none.
		for _, ctx := range []context.Context{t.Context(), ended} {
			got, err := s.sealer.Open(ctx, []byte("k"), bytes.Clone(stored))
			if err != nil || string(got) != "v" {
				t.Errorf("%q, %v", got, err)
			}
		}
	})
}
