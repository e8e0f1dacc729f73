package keyring

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// TestRecoveryProviderDoesNotWrap and need not: values are sealed without its copy, which is said,
// until it is back.
func TestRecoveryProviderDoesNotWrap(t *testing.T) {
	for name, fault := range map[string]func(*fakeKMS){
		"down":     func(k *fakeKMS) { k.down = kmsError("Status", kmsclient.Unreachable) },
		"disabled": func(k *fakeKMS) { k.down = kmsError("Status", kmsclient.KeyDisabled) },
		"denied":   func(k *fakeKMS) { k.opErr["Encrypt"] = kmsError("Encrypt", kmsclient.Denied) },
		"lost":     func(k *fakeKMS) { k.lost = kmsError("Encrypt", kmsclient.Unreachable) },
		"annotations": func(k *fakeKMS) {
			k.annotate = map[string][]byte{"big.example.com": make([]byte, envelope.MaxAnnotations)}
		},
		"over-long": func(k *fakeKMS) { k.rotate(strings.Repeat("k", envelope.MaxKeyID+1)) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
				s := newSite(t, ack, dr, false, nil)
				if name == "over-long" {
					fault(dr)
				} else {
					dr.set(func() { fault(dr) })
				}
				s.start(t)
				first := s.ack.mustSeal(t, "k", "v")
				if headerOf(t, first).HasCopies() {
					t.Fatal("there is a copy")
				}
				for range 30 {
					time.Sleep(time.Minute)
					s.ack.mustSeal(t, "k", "v")
				}
				st := s.ack.Recovery()
				if len(st) != 1 || st[0].Lacking == "" || s.ack.State().Reason != "" {
					t.Errorf("%+v", st)
				}
				if n := strings.Count(s.log.String(), "encrypted without a recovery copy"); n != 1 {
					t.Errorf("the log says so %d times:\n%s", n, s.log)
				}
				if n := ack.count("Encrypt"); n != 1 {
					t.Errorf("%d seeds were generated because a copy was missing", n)
				}
				if n := dr.count("Encrypt"); n > 40 {
					t.Errorf("dr was asked %d times", n)
				}
				if got := standing(t, s.sealer, "k", first); got != Stale {
					t.Errorf("a value without a copy is %v", got)
				}
				dr.set(func() { dr.down, dr.lost, dr.opErr, dr.annotate = nil, nil, map[string]error{}, nil })
				dr.rotate("key-9")
				time.Sleep(2*time.Minute + 10*time.Second)
				synctest.Wait()
				again := s.ack.mustSeal(t, "k", "v")
				if got := standing(t, s.sealer, "k", again); got != Current || !headerOf(t, again).HasCopies() {
					t.Errorf("once dr is back a value is %v", got)
				}
				if st := s.ack.Recovery(); st[0].Lacking != "" || !strings.Contains(s.log.String(), "every recovery copy again") {
					t.Errorf("%+v\n%s", st, s.log)
				}
				if n := ack.count("Encrypt"); n != 2 {
					t.Errorf("%d seeds", n)
				}
				s.ack.mustOpen(t, "k", first, "v")
			})
		})
	}
}

func TestRecoveryRequired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		dr.opErr["Encrypt"] = kmsError("Encrypt", kmsclient.Unreachable)
		s := newSite(t, ack, dr, true, func(c *RingConfig, _ *CacheConfig) { c.MaxAge, c.SealUnreachableFor = 24*time.Hour, 2*time.Hour }).start(t)
		_, err := s.ack.seal("k", "v")
		wantKind(t, err, Unavailable)
		for _, part := range []string{`"ack"`, `recovery provider "dr"`, "whose copy of the DEK seed is required"} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("the text does not hold %s: %v", part, err)
			}
		}
		if st := s.ack.Recovery(); len(st) != 1 || st[0].Lacking == "" || !st[0].Required {
			t.Errorf("%+v", st)
		}
		dr.set(func() { dr.opErr["Encrypt"] = kmsError("Encrypt", kmsclient.KeyDisabled) })
		time.Sleep(time.Minute)
		_, err = s.ack.seal("k", "v")
		wantKind(t, err, KeyUnusable)
		if st := s.ack.State(); st.Revoked {
			t.Error("what dr says was held against ack")
		}
		dr.set(func() { dr.opErr = map[string]error{} })
		time.Sleep(10 * time.Second)
		stored := s.ack.mustSeal(t, "k", "v")
		// The next seed is due, and dr is down: ack is not asked for seeds in vain, and the old one
		// is used up to its limit.
		time.Sleep(23 * time.Hour)
		dr.set(func() { dr.down = kmsError("Status", kmsclient.Unreachable) })
		time.Sleep(time.Minute)
		ack.set(func() { ack.calls = map[string]int{} })
		time.Sleep(2 * time.Hour)
		if keyIDOf(t, s.ack.mustSeal(t, "k", "v")) != "key-1" || ack.count("Encrypt") != 0 {
			t.Errorf("%d seeds", ack.count("Encrypt"))
		}
		s.ack.mustOpen(t, "k", stored, "v")
		time.Sleep(2 * time.Hour)
		_, err = s.ack.seal("k", "v")
		wantKind(t, err, Unavailable)
		if s.sealer.Health() == nil {
			t.Error("ready although it cannot seal")
		}
		s.ack.mustOpen(t, "k", stored, "v")
		dr.set(func() { dr.down = nil })
		time.Sleep(20 * time.Second)
		s.ack.mustSeal(t, "k", "v")
	})
}

// TestTwoRingsCopyEachOther: neither waits for the other once both are back.
func TestTwoRingsCopyEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := newKMS(t, "a"), newKMS(t, "b")
		ga := newRing(t, a, nil)
		gb := newRing(t, b, func(c *RingConfig, _ *CacheConfig) { c.Cache = ga.cache })
		for g, by := range map[*rig]*rig{ga: gb, gb: ga} {
			if err := g.SetRecovery([]*Ring{by.Ring}, true); err != nil {
				t.Fatal(err)
			}
		}
		a.down, b.down = kmsError("Status", kmsclient.Unreachable), kmsError("Status", kmsclient.Unreachable)
		ga.start(t)
		gb.start(t)
		time.Sleep(time.Minute)
		a.set(func() { a.down = nil })
		time.Sleep(time.Minute)
		_, err := ga.seal("k", "v")
		wantKind(t, err, Unavailable)
		b.set(func() { b.down = nil })
		time.Sleep(30 * time.Second)
		for _, g := range []*rig{ga, gb} {
			g.mustOpen(t, "k", g.mustSeal(t, "k", "v"), "v")
		}
	})
}

// TestRecoveryKeyIsRotated: the next seed is copied under its new key, and values under the old one
// are stale.
func TestRecoveryKeyIsRotated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		s := newSite(t, ack, dr, false, nil).start(t)
		old := s.ack.mustSeal(t, "k", "v")
		dr.rotate("key-2")
		time.Sleep(2*time.Minute + time.Second)
		now := s.ack.mustSeal(t, "k", "v")
		for want, v := range map[ValueState][]byte{Stale: old, Current: now} {
			if got := standing(t, s.sealer, "k", v); got != want {
				t.Errorf("a value is %v, want %v", got, want)
			}
		}
		time.Sleep(time.Hour)
		if n := ack.count("Encrypt"); n != 2 {
			t.Errorf("%d seeds", n)
		}
		// One that never says in Status what it wraps under is no reason for a seed a minute.
		dr.set(func() { dr.statusID = "key-0" })
		time.Sleep(6 * time.Hour)
		if n := ack.count("Encrypt"); n > 3 {
			t.Errorf("%d seeds", n)
		}
	})
}

func TestReservedAnnotationIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		kms.annotate = map[string][]byte{drCopy: []byte("x")}
		g := newRing(t, kms, nil).start(t)
		synctest.Wait()
		_, err := g.seal("k", "v")
		wantKind(t, err, Unavailable)
		if !strings.Contains(err.Error(), "the response of the KMS is wrong") {
			t.Error(err)
		}
	})
}

// TestRingsStopWhileTheyCopy: nothing waits for the other ring's KMS, and no blame is laid.
func TestRingsStopWhileTheyCopy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		s := newSite(t, ack, dr, false, nil).start(t)
		stored := s.ack.mustSeal(t, "k", "v")
		s.stop()
		s = newSite(t, ack, dr, false, func(c *RingConfig, _ *CacheConfig) { c.Timeout = 2 * time.Hour })
		ack.set(func() { ack.keyErr["key-1"] = goneError("Decrypt") })
		dr.set(func() { dr.delay = time.Hour })
		s.start(t)
		failed := make(chan error, 1)
		go func() { _, err := s.ack.open("k", stored); failed <- err }()
		synctest.Wait()
		began := time.Now()
		s.ack.stop()
		wantKind(t, <-failed, Unavailable)
		s.dr.stop()
		if d := time.Since(began); d > 0 {
			t.Errorf("it took %v to end", d)
		}
		if strings.Contains(s.log.String(), "without a recovery copy") {
			t.Errorf("log:\n%s", s.log)
		}
	})
}
