package keyring

import (
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// TestRequiredByReload: from the moment that copies are required nothing is sealed under the seed
// from before, which has none. What is written meanwhile waits for the next seed.
func TestRequiredByReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		s := newSite(t, ack, dr, false, nil)
		if err := s.ack.SetRecovery(nil, false); err != nil {
			t.Fatal(err)
		}
		s.start(t)
		s.ack.mustSeal(t, "k", "v")
		require := func(required bool) {
			t.Helper()
			if err := s.ack.SetRecovery([]*Ring{s.dr.Ring}, required); err != nil {
				t.Fatal(err)
			}
		}
		require(true)
		if !headerOf(t, s.ack.mustSeal(t, "k", "v")).HasCopies() {
			t.Error("sealed without the required copy")
		}

		dr.set(func() { dr.down = kmsError("Status", kmsclient.Unreachable) })
		ack.rotate("key-2")
		require(false)
		time.Sleep(2 * time.Minute)
		if headerOf(t, s.ack.mustSeal(t, "k", "v")).HasCopies() {
			t.Fatal("there is a copy by a KMS that is down")
		}
		require(true)
		_, err := s.ack.seal("k", "v")
		wantKind(t, err, Unavailable)
		if !strings.Contains(err.Error(), `recovery provider "dr"`) || s.ack.State().CanSeal || s.sealer.Health() == nil {
			t.Errorf("%v; %+v", err, s.ack.State())
		}
		if st := s.ack.Recovery(); len(st) != 1 || st[0].Lacking == "" || !st[0].Required {
			t.Errorf("%+v", st)
		}
		dr.set(func() { dr.down = nil })
		time.Sleep(20 * time.Second)
		if !headerOf(t, s.ack.mustSeal(t, "k", "v")).HasCopies() {
			t.Error("sealed without the required copy")
		}

		// A ring that has ended keeps nobody waiting.
		dr.set(func() { dr.down = kmsError("Status", kmsclient.Unreachable) })
		require(false)
		time.Sleep(2 * time.Minute)
		s.stop()
		if err := s.ack.SetRecovery([]*Ring{newRing(t, newKMS(t, "dr2"), nil).Ring}, true); err != nil {
			t.Fatal(err)
		}
		_, err = s.ack.seal("k", "v")
		wantKind(t, err, Unavailable)
	})
}

// TestSetRecoveryWhileRunning generates a DEK seed at the next health check, both ways.
func TestSetRecoveryWhileRunning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		s := newSite(t, ack, dr, false, nil).start(t)
		copied := s.ack.mustSeal(t, "k", "v")
		for _, rings := range [][]*Ring{nil, {s.dr.Ring}} {
			if err := s.ack.SetRecovery(rings, false); err != nil {
				t.Fatal(err)
			}
			if got, want := standing(t, s.sealer, "k", copied) == Current, rings != nil; got != want {
				t.Errorf("with %d recovery providers the copied value is current: %v", len(rings), got)
			}
			time.Sleep(time.Second)
			synctest.Wait()
			v := s.ack.mustSeal(t, "k", "v")
			if headerOf(t, v).HasCopies() != (rings != nil) || standing(t, s.sealer, "k", v) != Current {
				t.Errorf("with %d recovery providers: %+v", len(rings), headerOf(t, v))
			}
		}
	})
}

func TestSetRecoveryChecks(t *testing.T) {
	ack := newRing(t, newKMS(t, "ack"), nil)
	odd := newRing(t, newKMS(t, "D_r"), nil)
	dr := newRing(t, newKMS(t, "dr"), nil)
	for name, rings := range map[string][]*Ring{"itself": {ack.Ring}, "twice": {dr.Ring, dr.Ring}, "name": {odd.Ring}} {
		if err := ack.SetRecovery(rings, false); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := ack.SetRecovery([]*Ring{dr.Ring}, true); err != nil {
		t.Fatal(err)
	}
	before := ack.copier.set.Load()
	if err := ack.SetRecovery([]*Ring{dr.Ring}, true); err != nil || ack.copier.set.Load() != before {
		t.Error("setting the same again is a change")
	}
	if !slices.Equal(before.rings, []*Ring{dr.Ring}) || !before.required {
		t.Errorf("%+v", before)
	}
}
