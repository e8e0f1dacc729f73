package keyring

import (
	"bytes"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestUnreachableBeyondTheCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		s := newSite(t, ack, dr, false, func(_ *RingConfig, c *CacheConfig) { c.TTL, c.ServeUnreachableFor = time.Hour, time.Hour }).start(t)
		stored := s.ack.mustSeal(t, "k", "v")
		ack.set(func() { ack.down = kmsError("Status", kmsclient.Unreachable) })
		for range 119 {
			time.Sleep(time.Minute)
			s.ack.mustOpen(t, "k", stored, "v")
		}
		if dr.count("Decrypt") != 0 {
			t.Error("a copy was unwrapped within the limits of the cache")
		}
		time.Sleep(2 * time.Minute)
		ack.set(func() { ack.calls = map[string]int{} })
		for range 50 {
			s.ack.mustOpen(t, "k", stored, "v")
			time.Sleep(time.Minute)
		}
		if ack.count("Decrypt") > 1 || dr.count("Decrypt") != 1 || s.events.get("ack by dr") != 50 {
			t.Errorf("ack was asked %d, dr %d times; %d uses", ack.count("Decrypt"), dr.count("Decrypt"), s.events.get("ack by dr"))
		}
		if got := standing(t, s.sealer, "k", stored); got != Stale {
			t.Errorf("a value opened by a copy is %v", got)
		}
		// Back again: the KMS is asked beside the reads, and then serves.
		ack.set(func() { ack.down = nil })
		time.Sleep(time.Minute)
		s.ack.mustOpen(t, "k", stored, "v")
		synctest.Wait()
		n := s.events.get("ack by dr")
		s.ack.mustOpen(t, "k", stored, "v")
		if s.events.get("ack by dr") != n || standing(t, s.sealer, "k", stored) != Current {
			t.Error("the KMS is back, and a copy is used")
		}
	})
}

// TestKindsWithCopies: what is wrong for good is that only if it is so for every copy.
func TestKindsWithCopies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		stored := newSite(t, ack, dr, false, nil).start(t).ack.mustSeal(t, "k", "v")
		gone, invalid, unusable, silent := goneError("Decrypt"), kmsError("Decrypt", kmsclient.Invalid), kmsError("Decrypt", kmsclient.KeyDisabled), kmsError("Decrypt", kmsclient.Unreachable)
		for i, c := range []struct {
			ack, dr error
			want    Kind // 0: it opens
		}{
			{gone, nil, 0},
			{invalid, nil, 0},
			{silent, nil, 0},
			{kmsError("Decrypt", kmsclient.BrokenContract), nil, 0},
			{errors.New("of an unknown shape"), nil, 0},
			{unusable, nil, KeyUnusable},
			{kmsError("Decrypt", kmsclient.Denied), nil, KeyUnusable},
			{invalid, invalid, Corrupt},
			{invalid, silent, Unavailable},
			{invalid, gone, KeyUnusable},
			{gone, invalid, KeyUnusable},
			{gone, silent, Unavailable},
			{gone, unusable, KeyUnusable},
			{silent, invalid, Unavailable},
			{silent, unusable, Unavailable},
		} {
			ack.set(func() { ack.opErr = map[string]error{}; dr.opErr = map[string]error{} })
			s := newSite(t, ack, dr, false, nil).start(t)
			s.sealer = rule(t, SealerConfig{Write: s.ack.Ring, Recovery: []*Ring{s.dr.Ring}, Passthrough: true})
			ack.set(func() { ack.opErr["Decrypt"] = c.ack })
			dr.set(func() { dr.opErr["Decrypt"] = c.dr })
			got, err := openBy(s.sealer, "k", stored)
			if handedOn := c.want == Corrupt; handedOn != (got == string(stored)) {
				t.Errorf("%d: handed on is %v, %v", i, !handedOn, err)
			}
			if c.want == 0 && (got != "v" || err != nil) {
				t.Errorf("%d: %q, %v", i, got, err)
			}
			if c.want != 0 && c.want != Corrupt {
				wantKind(t, err, c.want)
			}
			if c.dr != nil && c.want != Corrupt && (!strings.Contains(err.Error(), `"ack"`) || !strings.Contains(err.Error(), `"dr"`)) {
				t.Errorf("%d: the text does not name both providers: %v", i, err)
			}
			s.stop()
		}
	})
}

// TestBurstOnALostKey makes one call to each provider.
func TestBurstOnALostKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		s := newSite(t, ack, dr, false, nil).start(t)
		stored := s.ack.mustSeal(t, "k", "v")
		s.stop()
		s = newSite(t, ack, dr, false, nil).start(t)
		// No call ends at the moment at which a caller comes, or the other call ends.
		ack.set(func() {
			ack.keyErr["key-1"] = goneError("Decrypt")
			ack.delay = 30*time.Millisecond + 7*time.Microsecond
		})
		dr.set(func() { dr.delay = 30 * time.Millisecond })
		var all sync.WaitGroup
		for i := range 5000 {
			all.Go(func() {
				if i%2 == 0 { // half of them while the calls are under way
					time.Sleep(time.Duration(i) * 15 * time.Microsecond)
				}
				s.ack.mustOpen(t, "k", stored, "v")
			})
		}
		all.Wait()
		// A caller between the end of the one call and the result of the other asks again.
		if a, d := ack.count("Decrypt"), dr.count("Decrypt"); a > 2 || d != 1 {
			t.Errorf("%d calls of ack, %d of dr", a, d)
		}
	})
}

// TestRulesDoNotShareCopies: a rule that does not name the copy's provider gains nothing by the
// other one that does.
func TestRulesDoNotShareCopies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		s := newSite(t, ack, dr, false, nil).start(t)
		stored := s.ack.mustSeal(t, "k", "v")
		other := rule(t, SealerConfig{Read: []*Ring{s.ack.Ring}})
		ack.set(func() { ack.down = goneError("Status") })
		time.Sleep(time.Minute)
		for range 3 {
			s.ack.mustOpen(t, "k", stored, "v")
			_, err := openBy(other, "k", stored)
			wantKind(t, err, KeyUnusable)
			if !strings.Contains(err.Error(), "names none of their providers: dr") {
				t.Error(err)
			}
		}
	})
}

// TestRecoveryKeyIsRevoked: seeds that came by it go with it.
func TestRecoveryKeyIsRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		s := newSite(t, ack, dr, false, nil).start(t)
		stored := s.ack.mustSeal(t, "k", "v")
		ack.set(func() { ack.down = goneError("Status") })
		time.Sleep(time.Minute)
		s.ack.mustOpen(t, "k", stored, "v")
		dr.set(func() { dr.down = kmsError("Status", kmsclient.KeyDisabled) })
		time.Sleep(time.Minute)
		_, err := s.ack.open("k", stored)
		wantKind(t, err, KeyUnusable)
		dr.set(func() { dr.down = nil })
		time.Sleep(10 * time.Second)
		s.ack.mustOpen(t, "k", stored, "v")
		// An old key of it alone: each poll asks for it.
		dr.rotate("key-2")
		time.Sleep(time.Minute)
		s.ack.mustOpen(t, "k", stored, "v")
		dr.set(func() { dr.keyErr["key-1"] = kmsError("Decrypt", kmsclient.KeyDisabled) })
		time.Sleep(2 * time.Minute)
		_, err = s.ack.open("k", stored)
		wantKind(t, err, KeyUnusable)
	})
}

// TestDamagedCopies: every byte of the copy changed, and cut short anywhere. The provider's own key
// does not care; without it there is an error, or the value.
func TestDamagedCopies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		s := newSite(t, ack, dr, false, nil).start(t)
		stored := s.ack.mustSeal(t, "k", "v")
		_, object, _ := envelope.Split(stored)
		o, err := envelope.Parse(object)
		if err != nil {
			t.Fatal(err)
		}
		encoded := o.Annotations[drCopy]
		var damaged [][]byte
		for i := range encoded {
			b := bytes.Clone(encoded)
			b[i] ^= 0x10
			damaged = append(damaged, b, encoded[:i])
		}
		values := make([][]byte, len(damaged))
		for i, b := range damaged {
			o.Annotations[drCopy] = b
			if values[i], err = o.Append([]byte("k8s:enc:kms:v2:ack:")); err != nil {
				t.Fatal(err)
			}
		}
		for _, v := range values {
			s.ack.mustOpen(t, "k", v, "v")
		}
		ack.set(func() { ack.down = goneError("Status") })
		time.Sleep(time.Minute)
		for i, v := range values {
			if got, err := s.ack.open("k", v); err == nil {
				t.Fatalf("copy %d of %d was damaged, and gave %q", i, len(values), got)
			} else if e, ok := errors.AsType[*Error](err); !ok || e.Kind != KeyUnusable {
				t.Fatalf("copy %d: %v", i, err)
			}
		}
		s.ack.mustOpen(t, "k", stored, "v")
	})
}

// TestRevokedWhileACopyIsUnwrapped: what comes by a key that has been refused in the meantime is
// not used, whichever key it is.
func TestRevokedWhileACopyIsUnwrapped(t *testing.T) {
	for _, which := range []string{"ack", "dr"} {
		synctest.Test(t, func(t *testing.T) {
			ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
			s := newSite(t, ack, dr, false, nil).start(t)
			stored := s.ack.mustSeal(t, "k", "v")
			s.stop()
			ack.down = goneError("Status")
			s = newSite(t, ack, dr, false, nil)
			slow := &slowDecrypt{fakeKMS: dr, release: make(chan struct{})}
			s.dr.p.cfg.KMS = slow
			s.start(t)
			failed := make(chan error, 1)
			go func() { _, err := s.ack.open("k", stored); failed <- err }()
			synctest.Wait()
			refused := map[string]*fakeKMS{"ack": ack, "dr": dr}[which]
			refused.set(func() { refused.down = kmsError("Status", kmsclient.KeyDisabled) })
			time.Sleep(61 * time.Second)
			// before the next poll: the unwrapping itself meets no fault
			refused.set(func() { refused.down = nil })
			close(slow.release)
			wantKind(t, <-failed, Unavailable)
			if n := s.ack.cache.Len(); n != 0 {
				t.Errorf("%s: %d seeds are left", which, n)
			}
		})
	}
}

// TestRevokedWhileTheKMSIsAsked: the key is disabled while its KMS fails to unwrap. The copies are
// not even tried.
func TestRevokedWhileTheKMSIsAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		s := newSite(t, ack, dr, false, nil).start(t)
		stored := s.ack.mustSeal(t, "k", "v")
		s.stop()
		s = newSite(t, ack, dr, false, nil)
		slow := &slowDecrypt{fakeKMS: ack, release: make(chan struct{})}
		s.ack.p.cfg.KMS = slow
		s.start(t)
		failed := make(chan error, 1)
		go func() { _, err := s.ack.open("k", stored); failed <- err }()
		synctest.Wait()
		ack.set(func() { ack.down = kmsError("Status", kmsclient.KeyDisabled) })
		time.Sleep(61 * time.Second)
		ack.set(func() { ack.opErr["Decrypt"] = kmsError("Decrypt", kmsclient.Unreachable); ack.down = nil })
		close(slow.release)
		wantKind(t, <-failed, Unavailable)
		if n := dr.count("Decrypt"); n != 0 {
			t.Errorf("%d copies were unwrapped", n)
		}
	})
}
