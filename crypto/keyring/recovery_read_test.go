package keyring_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestSeedsAreCopied(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
		stored := s.Ack.MustWrite(t, "k", "v")
		h := ringtest.HeaderOf(t, stored)
		c, err := envelope.ParseCopy(h.Annotations[ringtest.CopyByDR])
		if err != nil || c.KeyID != "key-1" || len(h.Annotations) != 2 {
			t.Fatalf("%+v, %v", h, err)
		}
		s.Ack.MustRead(t, "k", stored, "v")
		// A proxy that knows nothing of recovery reads it with the provider's own key, and so does
		// one that knows all.
		for _, g := range []*ringtest.Rig{ringtest.NewRig(t, ack, nil).Start(t), ringtest.NewSite(t, ack, dr, false, nil).Start(t).Ack} {
			g.MustRead(t, "k", stored, "v")
		}
		if ack.Count("Decrypt") != 2 || dr.Count("Decrypt") != 0 || dr.Count("Encrypt") != 2 {
			t.Errorf("ack unwrapped %d times, dr %d; dr wrapped %d times", ack.Count("Decrypt"), dr.Count("Decrypt"), dr.Count("Encrypt"))
		}
		if s.Events.Get("ack by dr") != 0 || ringtest.StateOf(t, s.Sealer, "k", stored) != keyring.Current {
			t.Error("a copy was used although all is well")
		}
		if st := s.Ack.Recovery(); len(st) != 1 || st[0] != (keyring.RecoveryState{Provider: "dr"}) {
			t.Errorf("%+v", st)
		}
	})
}

// TestPrimaryIsGoneForGood is the whole life: the key is lost, everything reads by the copies, and
// the rule moves to a new provider.
func TestPrimaryIsGoneForGood(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
		stored := s.Ack.MustWrite(t, "k", "v")
		bare := ack.Encrypted(t, "k", "no copy")
		ack.Set(func() { ack.Down = ringtest.GoneError("Status") })
		time.Sleep(time.Minute)
		synctest.Wait()
		ack.Set(func() { ack.Calls = map[string]int{} })
		for range 100 {
			s.Ack.MustRead(t, "k", stored, "v")
		}
		if ack.Count("Decrypt") != 0 || dr.Count("Decrypt") != 1 || s.Events.Get("ack by dr") != 100 {
			t.Errorf("ack unwrapped %d, dr %d times; %d uses", ack.Count("Decrypt"), dr.Count("Decrypt"), s.Events.Get("ack by dr"))
		}
		if n := s.Events.Get("rescue ack by dr key-1: true"); n != 1 {
			t.Errorf("one seed was unwrapped, and %d are told of", n)
		}
		_, err := s.Ack.Write("k", "v")
		ringtest.WantKind(t, err, keyring.KeyUnusable)
		_, err = s.Ack.Read("k", bare)
		ringtest.WantKind(t, err, keyring.KeyUnusable)
		if st := s.Ack.Recovery(); len(st) != 1 || st[0].Used.IsZero() {
			t.Errorf("%+v", st)
		}
		for range 60 {
			time.Sleep(time.Minute)
			s.Ack.MustRead(t, "k", stored, "v")
		}
		if n := strings.Count(s.Log.String(), "values are decrypted by recovery copies"); n != 2 {
			t.Errorf("the log says so %d times in an hour:\n%s", n, s.Log)
		}
		if n := dr.Count("Decrypt"); n != 1 {
			t.Errorf("dr unwrapped %d times: what it gave goes at each poll", n)
		}
		if got := ringtest.StateOf(t, s.Sealer, "k", stored); got != keyring.Stale {
			t.Errorf("a value opened by a copy is %v", got)
		}

		// After a restart, with a new provider.
		fresh := ringtest.NewKMS(t, "new")
		s = ringtest.NewSite(t, ack, dr, false, nil)
		g := ringtest.NewRig(t, fresh, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.Cache = s.Ack.Cache })
		if err := errors.Join(g.SetRecovery([]*keyring.Ring{s.DR.Ring}, false), s.Ack.SetRecovery(nil, false)); err != nil {
			t.Fatal(err)
		}
		g.Start(t)
		s.Start(t)
		for name, moved := range map[string]*rule.Sealer{
			"recovery": ringtest.NewRule(t, rule.Config{Write: g.Ring, Read: []*keyring.Ring{s.Ack.Ring}, Recovery: []*keyring.Ring{s.DR.Ring}}),
			"readWith": ringtest.NewRule(t, rule.Config{Read: []*keyring.Ring{s.Ack.Ring, s.DR.Ring}}),
			"writer":   ringtest.NewRule(t, rule.Config{Write: g.Ring, Read: []*keyring.Ring{s.DR.Ring, s.Ack.Ring}}),
		} {
			if got, err := ringtest.OpenBy(moved, "k", stored); err != nil || got != "v" {
				t.Errorf("%s: %q, %v", name, got, err)
			}
			if got := ringtest.StateOf(t, moved, "k", stored); got != keyring.Stale {
				t.Errorf("%s: it is %v", name, got)
			}
		}
		again := g.MustWrite(t, "k", "v")
		if got := ringtest.StateOf(t, ringtest.NewRule(t, rule.Config{Write: g.Ring, Recovery: []*keyring.Ring{s.DR.Ring}}), "k", again); got != keyring.Current {
			t.Errorf("the rewritten value is %v", got)
		}
		if _, ok := ringtest.HeaderOf(t, again).Annotations[ringtest.CopyByDR]; !ok {
			t.Error("the rewritten value has no copy")
		}
		// The key comes back: it is used again, and what it opens counts as such.
		ack.Set(func() { ack.Down, ack.Calls = nil, map[string]int{} })
		time.Sleep(10 * time.Second)
		synctest.Wait()
		n := s.Events.Get("ack by dr")
		s.Ack.MustRead(t, "k", stored, "v")
		if ack.Count("Decrypt") != 1 || s.Events.Get("ack by dr") != n {
			t.Error("the key is back, and a copy was used")
		}
	})
}

// TestOneVersionIsGone: the provider works, and one of its old keys is lost.
func TestOneVersionIsGone(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
		stored := s.Ack.MustWrite(t, "k", "v")
		ack.Rotate("key-2")
		ack.Set(func() { ack.KeyErr["key-1"] = ringtest.GoneError("Decrypt") })
		s.Stop()
		s = ringtest.NewSite(t, ack, dr, false, nil).Start(t)
		ack.Set(func() { ack.Calls = map[string]int{} })
		dr.Set(func() { dr.Calls = map[string]int{} })
		for range 120 {
			s.Ack.MustRead(t, "k", stored, "v")
			time.Sleep(time.Minute)
		}
		if ack.Count("Decrypt") != 1 || dr.Count("Decrypt") != 1 || ack.Count("Encrypt") > 1 {
			t.Errorf("ack unwrapped %d and wrapped %d, dr unwrapped %d times in two hours", ack.Count("Decrypt"), ack.Count("Encrypt"), dr.Count("Decrypt"))
		}
		s.Ack.MustRead(t, "k", s.Ack.MustWrite(t, "k", "w"), "w")
	})
}

// TestRefusalIsNotRecovered: who disables a key, or takes the permission away, ends its use, copies
// or not.
func TestRefusalIsNotRecovered(t *testing.T) {
	for reason, within := range map[kmsclient.Reason]time.Duration{kmsclient.KeyDisabled: time.Minute, kmsclient.Denied: 3 * time.Minute} {
		t.Run(reason.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
				s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
				stored := s.Ack.MustWrite(t, "k", "v")
				refuse := func() {
					t.Helper()
					_, err := s.Ack.Read("k", stored)
					ringtest.WantKind(t, err, keyring.KeyUnusable)
				}
				ack.Set(func() { ack.Down = ringtest.KMSError("Status", reason) })
				time.Sleep(within)
				refuse()
				// does not lift it
				ack.Set(func() { ack.Down = ringtest.KMSError("Status", kmsclient.Unreachable) })
				time.Sleep(time.Minute)
				refuse()
				if dr.Count("Decrypt") != 0 {
					t.Error("a copy was unwrapped")
				}
				// A key that is gone and then there again, but disabled: what the copies gave goes
				// too.
				ack.Set(func() { ack.Down = ringtest.GoneError("Status") })
				time.Sleep(time.Minute)
				s.Ack.MustRead(t, "k", stored, "v")
				ack.Set(func() { ack.Down = ringtest.KMSError("Status", reason) })
				time.Sleep(within)
				refuse()
				if n := s.Ack.Cache.Len(); n != 0 {
					t.Errorf("%d seeds are left", n)
				}
				// With the seed cold, from the start.
				s = ringtest.NewSite(t, ack, dr, false, nil).Start(t)
				time.Sleep(within)
				refuse()
				// Only the value's own key, which is not the current one.
				ack.Set(func() { ack.Down = nil; ack.KeyErr["key-1"] = ringtest.KMSError("Decrypt", reason) })
				ack.Rotate("key-2")
				s = ringtest.NewSite(t, ack, dr, false, nil).Start(t)
				refuse()
				if n := dr.Count("Decrypt"); n != 1 {
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
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
		stored := s.Ack.MustWrite(t, "k", "v")
		ack.Set(func() { ack.Down = ringtest.GoneError("Status") })
		time.Sleep(time.Minute)
		synctest.Wait()
		ended, end := context.WithCancel(t.Context())
		end()
		for _, pass := range []bool{false, true} {
			counts := &ringtest.Events{}
			sealer := ringtest.NewRule(t, rule.Config{Write: s.Ack.Ring, Recovery: []*keyring.Ring{s.DR.Ring}, Passthrough: pass, Observer: counts})
			got, err := sealer.Open(ended, nil, []byte("k"), bytes.Clone(stored))
			if got != nil {
				t.Errorf("passthrough %t: %d bytes were handed on", pass, len(got))
			}
			ringtest.WantKind(t, err, keyring.Unavailable)
			if len(counts.Counts) != 0 {
				t.Errorf("passthrough %t: what nobody was told is counted: %v", pass, counts.Counts)
			}
		}
		// With time, the copy opens it; from then on it takes none.
		for _, ctx := range []context.Context{t.Context(), ended} {
			got, err := s.Sealer.Open(ctx, nil, []byte("k"), bytes.Clone(stored))
			if err != nil || string(got) != "v" {
				t.Errorf("%q, %v", got, err)
			}
		}
	})
}
