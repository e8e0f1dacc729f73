package keyring_test

import (
	"bytes"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestUnreachableBeyondTheCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		s := ringtest.NewSite(t, ack, dr, false, func(_ *keyring.RingConfig, c *keyring.CacheConfig) {
			c.TTL, c.ServeUnreachableFor = time.Hour, time.Hour
		}).Start(t)
		stored := s.Ack.MustWrite(t, "k", "v")
		ack.Set(func() { ack.Down = ringtest.KMSError("Status", kmsclient.Unreachable) })
		for range 119 {
			time.Sleep(time.Minute)
			s.Ack.MustRead(t, "k", stored, "v")
		}
		if dr.Count("Decrypt") != 0 {
			t.Error("a copy was unwrapped within the limits of the cache")
		}
		time.Sleep(2 * time.Minute)
		ack.Set(func() { ack.Calls = map[string]int{} })
		for range 50 {
			s.Ack.MustRead(t, "k", stored, "v")
			time.Sleep(time.Minute)
		}
		if ack.Count("Decrypt") > 1 || dr.Count("Decrypt") != 1 || s.Events.Get("ack by dr") != 50 {
			t.Errorf("ack was asked %d, dr %d times; %d uses", ack.Count("Decrypt"), dr.Count("Decrypt"), s.Events.Get("ack by dr"))
		}
		if got := ringtest.StateOf(t, s.Sealer, "k", stored); got != keyring.Stale {
			t.Errorf("a value opened by a copy is %v", got)
		}
		// Back again: the KMS is asked beside the reads, and then serves.
		ack.Set(func() { ack.Down = nil })
		time.Sleep(time.Minute)
		s.Ack.MustRead(t, "k", stored, "v")
		synctest.Wait()
		n := s.Events.Get("ack by dr")
		s.Ack.MustRead(t, "k", stored, "v")
		if s.Events.Get("ack by dr") != n || ringtest.StateOf(t, s.Sealer, "k", stored) != keyring.Current {
			t.Error("the KMS is back, and a copy is used")
		}
	})
}

// TestKindsWithCopies: what is wrong for good is that only if it is so for every copy.
func TestKindsWithCopies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		stored := ringtest.NewSite(t, ack, dr, false, nil).Start(t).Ack.MustWrite(t, "k", "v")
		gone, invalid, unusable, silent := ringtest.GoneError("Decrypt"), ringtest.KMSError("Decrypt", kmsclient.Invalid), ringtest.KMSError("Decrypt", kmsclient.KeyDisabled), ringtest.KMSError("Decrypt", kmsclient.Unreachable)
		for i, c := range []struct {
			ack, dr error
			want    keyring.Kind // 0: it opens
		}{
			{gone, nil, 0},
			{invalid, nil, 0},
			{silent, nil, 0},
			{ringtest.KMSError("Decrypt", kmsclient.BrokenContract), nil, 0},
			{errors.New("of an unknown shape"), nil, 0},
			{unusable, nil, keyring.KeyUnusable},
			{ringtest.KMSError("Decrypt", kmsclient.Denied), nil, keyring.KeyUnusable},
			{invalid, invalid, keyring.Corrupt},
			{invalid, silent, keyring.Unavailable},
			{invalid, gone, keyring.KeyUnusable},
			{gone, invalid, keyring.KeyUnusable},
			{gone, silent, keyring.Unavailable},
			{gone, unusable, keyring.KeyUnusable},
			{silent, invalid, keyring.Unavailable},
			{silent, unusable, keyring.Unavailable},
		} {
			ack.Set(func() { ack.OpErr = map[string]error{}; dr.OpErr = map[string]error{} })
			s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
			s.Sealer = ringtest.NewRule(t, rule.Config{Write: s.Ack.Ring, Recovery: []*keyring.Ring{s.DR.Ring}, Passthrough: true})
			ack.Set(func() { ack.OpErr["Decrypt"] = c.ack })
			dr.Set(func() { dr.OpErr["Decrypt"] = c.dr })
			got, err := ringtest.OpenBy(s.Sealer, "k", stored)
			if handedOn := c.want == keyring.Corrupt; handedOn != (got == string(stored)) {
				t.Errorf("%d: handed on is %v, %v", i, !handedOn, err)
			}
			if c.want == 0 && (got != "v" || err != nil) {
				t.Errorf("%d: %q, %v", i, got, err)
			}
			if c.want != 0 && c.want != keyring.Corrupt {
				ringtest.WantKind(t, err, c.want)
			}
			if c.dr != nil && c.want != keyring.Corrupt && (!strings.Contains(err.Error(), `"ack"`) || !strings.Contains(err.Error(), `"dr"`)) {
				t.Errorf("%d: the text does not name both providers: %v", i, err)
			}
			s.Stop()
		}
	})
}

// TestBurstOnALostKey makes one call to each provider.
func TestBurstOnALostKey(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
		stored := s.Ack.MustWrite(t, "k", "v")
		s.Stop()
		s = ringtest.NewSite(t, ack, dr, false, nil).Start(t)
		// No call ends at the moment at which a caller comes, or the other call ends.
		ack.Set(func() {
			ack.KeyErr["key-1"] = ringtest.GoneError("Decrypt")
			ack.Delay = 30*time.Millisecond + 7*time.Microsecond
		})
		dr.Set(func() { dr.Delay = 30 * time.Millisecond })
		var all sync.WaitGroup
		for i := range 5000 {
			all.Go(func() {
				if i%2 == 0 { // half of them while the calls are under way
					time.Sleep(time.Duration(i) * 15 * time.Microsecond)
				}
				s.Ack.MustRead(t, "k", stored, "v")
			})
		}
		all.Wait()
		// A caller between the end of the one call and the result of the other asks again.
		if a, d := ack.Count("Decrypt"), dr.Count("Decrypt"); a > 2 || d != 1 {
			t.Errorf("%d calls of ack, %d of dr", a, d)
		}
	})
}

// TestRulesDoNotShareCopies: a rule that does not name the copy's provider gains nothing by the
// other one that does.
func TestRulesDoNotShareCopies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
		stored := s.Ack.MustWrite(t, "k", "v")
		other := ringtest.NewRule(t, rule.Config{Read: []*keyring.Ring{s.Ack.Ring}})
		ack.Set(func() { ack.Down = ringtest.GoneError("Status") })
		time.Sleep(time.Minute)
		for range 3 {
			s.Ack.MustRead(t, "k", stored, "v")
			_, err := ringtest.OpenBy(other, "k", stored)
			ringtest.WantKind(t, err, keyring.KeyUnusable)
			if !strings.Contains(err.Error(), "names none of their providers: dr") {
				t.Error(err)
			}
		}
	})
}

// TestRecoveryKeyIsRevoked: seeds that came by it go with it.
func TestRecoveryKeyIsRevoked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
		stored := s.Ack.MustWrite(t, "k", "v")
		ack.Set(func() { ack.Down = ringtest.GoneError("Status") })
		time.Sleep(time.Minute)
		s.Ack.MustRead(t, "k", stored, "v")
		dr.Set(func() { dr.Down = ringtest.KMSError("Status", kmsclient.KeyDisabled) })
		time.Sleep(time.Minute)
		_, err := s.Ack.Read("k", stored)
		ringtest.WantKind(t, err, keyring.KeyUnusable)
		dr.Set(func() { dr.Down = nil })
		time.Sleep(10 * time.Second)
		s.Ack.MustRead(t, "k", stored, "v")
		// An old key of it alone: each poll asks for it.
		dr.Rotate("key-2")
		time.Sleep(time.Minute)
		s.Ack.MustRead(t, "k", stored, "v")
		dr.Set(func() { dr.KeyErr["key-1"] = ringtest.KMSError("Decrypt", kmsclient.KeyDisabled) })
		time.Sleep(2 * time.Minute)
		_, err = s.Ack.Read("k", stored)
		ringtest.WantKind(t, err, keyring.KeyUnusable)
	})
}

// TestDamagedCopies: every byte of the copy changed, and cut short anywhere. The provider's own key
// does not care; without it there is an error, or the value.
func TestDamagedCopies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
		stored := s.Ack.MustWrite(t, "k", "v")
		_, object, _ := envelope.Split(stored)
		o, err := envelope.Parse(object)
		if err != nil {
			t.Fatal(err)
		}
		encoded := o.Annotations[ringtest.CopyByDR]
		var damaged [][]byte
		for i := range encoded {
			b := bytes.Clone(encoded)
			b[i] ^= 0x10
			damaged = append(damaged, b, encoded[:i])
		}
		values := make([][]byte, len(damaged))
		for i, b := range damaged {
			o.Annotations[ringtest.CopyByDR] = b
			if values[i], err = o.Append([]byte("k8s:enc:kms:v2:ack:")); err != nil {
				t.Fatal(err)
			}
		}
		for _, v := range values {
			s.Ack.MustRead(t, "k", v, "v")
		}
		ack.Set(func() { ack.Down = ringtest.GoneError("Status") })
		time.Sleep(time.Minute)
		for i, v := range values {
			if got, err := s.Ack.Read("k", v); err == nil {
				t.Fatalf("copy %d of %d was damaged, and gave %q", i, len(values), got)
			} else if e, ok := errors.AsType[*keyring.Error](err); !ok || e.Kind != keyring.KeyUnusable {
				t.Fatalf("copy %d: %v", i, err)
			}
		}
		s.Ack.MustRead(t, "k", stored, "v")
	})
}

// TestRevokedWhileACopyIsUnwrapped: what comes by a key that has been refused in the meantime is
// not used, whichever key it is.
func TestRevokedWhileACopyIsUnwrapped(t *testing.T) {
	for _, which := range []string{"ack", "dr"} {
		synctest.Test(t, func(t *testing.T) {
			ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
			s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
			stored := s.Ack.MustWrite(t, "k", "v")
			s.Stop()
			ack.Down = ringtest.GoneError("Status")
			s = ringtest.NewSite(t, ack, dr, false, nil)
			slow := &slowDecrypt{KMS: dr, release: make(chan struct{})}
			s.DR.SetKMS(slow)
			s.Start(t)
			failed := make(chan error, 1)
			go func() { _, err := s.Ack.Read("k", stored); failed <- err }()
			synctest.Wait()
			refused := map[string]*ringtest.KMS{"ack": ack, "dr": dr}[which]
			refused.Set(func() { refused.Down = ringtest.KMSError("Status", kmsclient.KeyDisabled) })
			time.Sleep(61 * time.Second)
			// before the next poll: the unwrapping itself meets no fault
			refused.Set(func() { refused.Down = nil })
			close(slow.release)
			ringtest.WantKind(t, <-failed, keyring.Unavailable)
			if n := s.Ack.Cache.Len(); n != 0 {
				t.Errorf("%s: %d seeds are left", which, n)
			}
		})
	}
}

// TestRevokedWhileTheKMSIsAsked: the key is disabled while its KMS fails to unwrap. The copies are
// not even tried.
func TestRevokedWhileTheKMSIsAsked(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
		stored := s.Ack.MustWrite(t, "k", "v")
		s.Stop()
		s = ringtest.NewSite(t, ack, dr, false, nil)
		slow := &slowDecrypt{KMS: ack, release: make(chan struct{})}
		s.Ack.SetKMS(slow)
		s.Start(t)
		failed := make(chan error, 1)
		go func() { _, err := s.Ack.Read("k", stored); failed <- err }()
		synctest.Wait()
		ack.Set(func() { ack.Down = ringtest.KMSError("Status", kmsclient.KeyDisabled) })
		time.Sleep(61 * time.Second)
		ack.Set(func() { ack.OpErr["Decrypt"] = ringtest.KMSError("Decrypt", kmsclient.Unreachable); ack.Down = nil })
		close(slow.release)
		ringtest.WantKind(t, <-failed, keyring.Unavailable)
		if n := dr.Count("Decrypt"); n != 0 {
			t.Errorf("%d copies were unwrapped", n)
		}
	})
}
