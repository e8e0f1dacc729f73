package keyring_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// TestRecoveryProviderDoesNotWrap and need not: values are sealed without its copy, which is said,
// until it is back.
func TestRecoveryProviderDoesNotWrap(t *testing.T) {
	for name, fault := range map[string]func(*ringtest.KMS){
		"down":     func(k *ringtest.KMS) { k.Down = ringtest.KMSError("Status", kmsclient.Unreachable) },
		"disabled": func(k *ringtest.KMS) { k.Down = ringtest.KMSError("Status", kmsclient.KeyDisabled) },
		"denied":   func(k *ringtest.KMS) { k.OpErr["Encrypt"] = ringtest.KMSError("Encrypt", kmsclient.Denied) },
		"lost":     func(k *ringtest.KMS) { k.Lost = ringtest.KMSError("Encrypt", kmsclient.Unreachable) },
		"annotations": func(k *ringtest.KMS) {
			k.Annotate = map[string][]byte{"big.example.com": make([]byte, envelope.MaxAnnotations)}
		},
		"over-long": func(k *ringtest.KMS) { k.Rotate(strings.Repeat("k", envelope.MaxKeyID+1)) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
				s := ringtest.NewSite(t, ack, dr, false, nil)
				if name == "over-long" {
					fault(dr)
				} else {
					dr.Set(func() { fault(dr) })
				}
				s.Start(t)
				first := s.Ack.MustWrite(t, "k", "v")
				if ringtest.HeaderOf(t, first).HasCopies() {
					t.Fatal("there is a copy")
				}
				for range 30 {
					time.Sleep(time.Minute)
					s.Ack.MustWrite(t, "k", "v")
				}
				st := s.Ack.Recovery()
				if len(st) != 1 || st[0].Lacking == "" || s.Ack.State().Reason != "" {
					t.Errorf("%+v", st)
				}
				if n := strings.Count(s.Log.String(), "encrypted without a recovery copy"); n != 1 {
					t.Errorf("the log says so %d times:\n%s", n, s.Log)
				}
				if n := ack.Count("Encrypt"); n != 1 {
					t.Errorf("%d seeds were generated because a copy was missing", n)
				}
				if n := dr.Count("Encrypt"); n > 40 {
					t.Errorf("dr was asked %d times", n)
				}
				if got := ringtest.StateOf(t, s.Sealer, "k", first); got != keyring.Stale {
					t.Errorf("a value without a copy is %v", got)
				}
				dr.Set(func() { dr.Down, dr.Lost, dr.OpErr, dr.Annotate = nil, nil, map[string]error{}, nil })
				dr.Rotate("key-9")
				time.Sleep(2*time.Minute + 10*time.Second)
				synctest.Wait()
				again := s.Ack.MustWrite(t, "k", "v")
				if got := ringtest.StateOf(t, s.Sealer, "k", again); got != keyring.Current || !ringtest.HeaderOf(t, again).HasCopies() {
					t.Errorf("once dr is back a value is %v", got)
				}
				if st := s.Ack.Recovery(); st[0].Lacking != "" || !strings.Contains(s.Log.String(), "every recovery copy again") {
					t.Errorf("%+v\n%s", st, s.Log)
				}
				if n := ack.Count("Encrypt"); n != 2 {
					t.Errorf("%d seeds", n)
				}
				s.Ack.MustRead(t, "k", first, "v")
			})
		})
	}
}

func TestRecoveryRequired(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		dr.OpErr["Encrypt"] = ringtest.KMSError("Encrypt", kmsclient.Unreachable)
		s := ringtest.NewSite(t, ack, dr, true, func(c *keyring.RingConfig, _ *keyring.CacheConfig) {
			c.MaxAge, c.SealUnreachableFor = 24*time.Hour, 2*time.Hour
		}).Start(t)
		_, err := s.Ack.Write("k", "v")
		ringtest.WantKind(t, err, keyring.Unavailable)
		for _, part := range []string{`"ack"`, `recovery provider "dr"`, "whose copy of the DEK seed is required"} {
			if !strings.Contains(err.Error(), part) {
				t.Errorf("the text does not hold %s: %v", part, err)
			}
		}
		if st := s.Ack.Recovery(); len(st) != 1 || st[0].Lacking == "" || !st[0].Required {
			t.Errorf("%+v", st)
		}
		dr.Set(func() { dr.OpErr["Encrypt"] = ringtest.KMSError("Encrypt", kmsclient.KeyDisabled) })
		time.Sleep(time.Minute)
		_, err = s.Ack.Write("k", "v")
		ringtest.WantKind(t, err, keyring.KeyUnusable)
		if st := s.Ack.State(); st.Revoked {
			t.Error("what dr says was held against ack")
		}
		dr.Set(func() { dr.OpErr = map[string]error{} })
		time.Sleep(10 * time.Second)
		stored := s.Ack.MustWrite(t, "k", "v")
		// The next seed is due, and dr is down: ack is not asked for seeds in vain, and the old one
		// is used up to its limit.
		time.Sleep(23 * time.Hour)
		dr.Set(func() { dr.Down = ringtest.KMSError("Status", kmsclient.Unreachable) })
		time.Sleep(time.Minute)
		ack.Set(func() { ack.Calls = map[string]int{} })
		time.Sleep(2 * time.Hour)
		if ringtest.KeyIDOf(t, s.Ack.MustWrite(t, "k", "v")) != "key-1" || ack.Count("Encrypt") != 0 {
			t.Errorf("%d seeds", ack.Count("Encrypt"))
		}
		s.Ack.MustRead(t, "k", stored, "v")
		time.Sleep(2 * time.Hour)
		_, err = s.Ack.Write("k", "v")
		ringtest.WantKind(t, err, keyring.Unavailable)
		if s.Sealer.Health() == nil {
			t.Error("ready although it cannot seal")
		}
		s.Ack.MustRead(t, "k", stored, "v")
		dr.Set(func() { dr.Down = nil })
		time.Sleep(20 * time.Second)
		s.Ack.MustWrite(t, "k", "v")
	})
}

// TestTwoRingsCopyEachOther: neither waits for the other once both are back.
func TestTwoRingsCopyEachOther(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a, b := ringtest.NewKMS(t, "a"), ringtest.NewKMS(t, "b")
		ga := ringtest.NewRig(t, a, nil)
		gb := ringtest.NewRig(t, b, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.Cache = ga.Cache })
		for g, by := range map[*ringtest.Rig]*ringtest.Rig{ga: gb, gb: ga} {
			if err := g.SetRecovery([]*keyring.Ring{by.Ring}, true); err != nil {
				t.Fatal(err)
			}
		}
		a.Down, b.Down = ringtest.KMSError("Status", kmsclient.Unreachable), ringtest.KMSError("Status", kmsclient.Unreachable)
		ga.Start(t)
		gb.Start(t)
		time.Sleep(time.Minute)
		a.Set(func() { a.Down = nil })
		time.Sleep(time.Minute)
		_, err := ga.Write("k", "v")
		ringtest.WantKind(t, err, keyring.Unavailable)
		b.Set(func() { b.Down = nil })
		time.Sleep(30 * time.Second)
		for _, g := range []*ringtest.Rig{ga, gb} {
			g.MustRead(t, "k", g.MustWrite(t, "k", "v"), "v")
		}
	})
}

// TestRecoveryKeyIsRotated: the next seed is copied under its new key, and values under the old one
// are stale.
func TestRecoveryKeyIsRotated(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
		old := s.Ack.MustWrite(t, "k", "v")
		dr.Rotate("key-2")
		time.Sleep(2*time.Minute + time.Second)
		now := s.Ack.MustWrite(t, "k", "v")
		for want, v := range map[keyring.ValueState][]byte{keyring.Stale: old, keyring.Current: now} {
			if got := ringtest.StateOf(t, s.Sealer, "k", v); got != want {
				t.Errorf("a value is %v, want %v", got, want)
			}
		}
		time.Sleep(time.Hour)
		if n := ack.Count("Encrypt"); n != 2 {
			t.Errorf("%d seeds", n)
		}
		// One that never says in Status what it wraps under is no reason for a seed a minute.
		dr.Set(func() { dr.StatusID = "key-0" })
		time.Sleep(6 * time.Hour)
		if n := ack.Count("Encrypt"); n > 3 {
			t.Errorf("%d seeds", n)
		}
	})
}

func TestReservedAnnotationIsRefused(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		kms.Annotate = map[string][]byte{ringtest.CopyByDR: []byte("x")}
		g := ringtest.NewRig(t, kms, nil).Start(t)
		synctest.Wait()
		_, err := g.Write("k", "v")
		ringtest.WantKind(t, err, keyring.Unavailable)
		if !strings.Contains(err.Error(), "the response of the KMS is wrong") {
			t.Error(err)
		}
	})
}

// TestRingsStopWhileTheyCopy: nothing waits for the other ring's KMS, and no blame is laid.
func TestRingsStopWhileTheyCopy(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
		stored := s.Ack.MustWrite(t, "k", "v")
		s.Stop()
		s = ringtest.NewSite(t, ack, dr, false, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.Timeout = 2 * time.Hour })
		ack.Set(func() { ack.KeyErr["key-1"] = ringtest.GoneError("Decrypt") })
		dr.Set(func() { dr.Delay = time.Hour })
		s.Start(t)
		failed := make(chan error, 1)
		go func() { _, err := s.Ack.Read("k", stored); failed <- err }()
		synctest.Wait()
		began := time.Now()
		s.Ack.Stop()
		ringtest.WantKind(t, <-failed, keyring.Unavailable)
		s.DR.Stop()
		if d := time.Since(began); d > 0 {
			t.Errorf("it took %v to end", d)
		}
		if strings.Contains(s.Log.String(), "without a recovery copy") {
			t.Errorf("log:\n%s", s.Log)
		}
	})
}
