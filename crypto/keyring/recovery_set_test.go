package keyring_test

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// TestRequiredByReload: from the moment that copies are required nothing is sealed under the seed
// from before, which has none. What is written meanwhile waits for the next seed.
func TestRequiredByReload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		s := ringtest.NewSite(t, ack, dr, false, nil)
		if err := s.Ack.SetRecovery(nil, false); err != nil {
			t.Fatal(err)
		}
		s.Start(t)
		s.Ack.MustWrite(t, "k", "v")
		require := func(required bool) {
			t.Helper()
			if err := s.Ack.SetRecovery([]*keyring.Ring{s.DR.Ring}, required); err != nil {
				t.Fatal(err)
			}
		}
		require(true)
		if !ringtest.HeaderOf(t, s.Ack.MustWrite(t, "k", "v")).HasCopies() {
			t.Error("sealed without the required copy")
		}

		dr.Set(func() { dr.Down = ringtest.KMSError("Status", kmsclient.Unreachable) })
		ack.Rotate("key-2")
		require(false)
		time.Sleep(2 * time.Minute)
		if ringtest.HeaderOf(t, s.Ack.MustWrite(t, "k", "v")).HasCopies() {
			t.Fatal("there is a copy by a KMS that is down")
		}
		require(true)
		_, err := s.Ack.Write("k", "v")
		ringtest.WantKind(t, err, keyring.Unavailable)
		if !strings.Contains(err.Error(), `recovery provider "dr"`) || s.Ack.State().CanSeal || s.Sealer.Health() == nil {
			t.Errorf("%v; %+v", err, s.Ack.State())
		}
		if st := s.Ack.Recovery(); len(st) != 1 || st[0].Lacking == "" || !st[0].Required {
			t.Errorf("%+v", st)
		}
		dr.Set(func() { dr.Down = nil })
		time.Sleep(20 * time.Second)
		if !ringtest.HeaderOf(t, s.Ack.MustWrite(t, "k", "v")).HasCopies() {
			t.Error("sealed without the required copy")
		}

		// A ring that has ended keeps nobody waiting.
		dr.Set(func() { dr.Down = ringtest.KMSError("Status", kmsclient.Unreachable) })
		require(false)
		time.Sleep(2 * time.Minute)
		s.Stop()
		if err := s.Ack.SetRecovery([]*keyring.Ring{ringtest.NewRig(t, ringtest.NewKMS(t, "dr2"), nil).Ring}, true); err != nil {
			t.Fatal(err)
		}
		_, err = s.Ack.Write("k", "v")
		ringtest.WantKind(t, err, keyring.Unavailable)
	})
}

// TestSetRecoveryWhileRunning generates a DEK seed at the next health check, both ways.
func TestSetRecoveryWhileRunning(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
		copied := s.Ack.MustWrite(t, "k", "v")
		for _, rings := range [][]*keyring.Ring{nil, {s.DR.Ring}} {
			if err := s.Ack.SetRecovery(rings, false); err != nil {
				t.Fatal(err)
			}
			if got, want := ringtest.StateOf(t, s.Sealer, "k", copied) == keyring.Current, rings != nil; got != want {
				t.Errorf("with %d recovery providers the copied value is current: %v", len(rings), got)
			}
			time.Sleep(time.Second)
			synctest.Wait()
			v := s.Ack.MustWrite(t, "k", "v")
			if ringtest.HeaderOf(t, v).HasCopies() != (rings != nil) || ringtest.StateOf(t, s.Sealer, "k", v) != keyring.Current {
				t.Errorf("with %d recovery providers: %+v", len(rings), ringtest.HeaderOf(t, v))
			}
		}
	})
}

func TestSetRecoveryChecks(t *testing.T) {
	ack := ringtest.NewRig(t, ringtest.NewKMS(t, "ack"), nil)
	odd := ringtest.NewRig(t, ringtest.NewKMS(t, "D_r"), nil)
	dr := ringtest.NewRig(t, ringtest.NewKMS(t, "dr"), nil)
	for name, rings := range map[string][]*keyring.Ring{"itself": {ack.Ring}, "twice": {dr.Ring, dr.Ring}, "name": {odd.Ring}} {
		if err := ack.SetRecovery(rings, false); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	if err := ack.SetRecovery([]*keyring.Ring{dr.Ring}, true); err != nil {
		t.Fatal(err)
	}
	before := ack.RecoverySetting()
	if err := ack.SetRecovery([]*keyring.Ring{dr.Ring}, true); err != nil || ack.RecoverySetting() != before {
		t.Error("setting the same again is a change")
	}
	if set := ack.Recovery(); len(set) != 1 || set[0].Provider != "dr" || !set[0].Required {
		t.Errorf("%+v", set)
	}
}
