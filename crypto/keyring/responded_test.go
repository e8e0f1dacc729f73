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

// TestAnswered tells which failures say something of one seed and which of the KMS, with and
// without a recovery copy.
func TestAnswered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		unknown := &kmsclient.Error{Op: "Decrypt", Reason: kmsclient.Failing, Code: "Unknown"}
		silent, invalid := ringtest.KMSError("Decrypt", kmsclient.Unreachable), ringtest.KMSError("Decrypt", kmsclient.Invalid)
		contract, denied, gone := ringtest.KMSError("Decrypt", kmsclient.BrokenContract), ringtest.KMSError("Decrypt", kmsclient.Denied), ringtest.GoneError("Decrypt")
		for i, c := range []struct {
			ack, dr error
			alone   bool // without a recovery copy
			want    bool
		}{
			{ack: unknown, alone: true, want: true},
			{ack: contract, alone: true, want: true},
			{ack: silent, alone: true},
			{ack: invalid, alone: true}, // says what is wrong
			{ack: denied, alone: true},
			{ack: gone, alone: true},
			{ack: errors.New("of an unknown shape"), alone: true},
			{ack: unknown, dr: unknown, want: true},
			{ack: unknown, dr: invalid, want: true},
			{ack: unknown, dr: silent}, // which may still open it
			{ack: silent, dr: unknown},
			{ack: invalid, dr: unknown, want: true},
			{ack: gone, dr: unknown, want: true},
			{ack: invalid, dr: silent},
			{ack: gone, dr: silent},
		} {
			ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
			stored := ringtest.NewSite(t, ack, dr, false, nil).Start(t).Ack.MustWrite(t, "/s/k", "v")
			if c.alone {
				stored = ack.Encrypted(t, "/s/k", "v")
			}
			s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
			s.Sealer = ringtest.NewRule(t, rule.Config{Write: s.Ack.Ring, Recovery: []*keyring.Ring{s.DR.Ring}})
			ack.Set(func() { ack.OpErr["Decrypt"] = c.ack })
			dr.Set(func() { dr.OpErr["Decrypt"] = c.dr })
			_, err := ringtest.OpenBy(s.Sealer, "/s/k", stored)
			e, ok := errors.AsType[*keyring.Error](err)
			if !ok || e.Responded() != c.want {
				t.Errorf("%d: answered is not %v: %v", i, c.want, err)
			}
			if ok && c.want && (!strings.Contains(e.Text, `"/s/k"`) || strings.Contains(e.OfSeed(), "/s/k")) {
				t.Errorf("%d: the text names no key, or that of the seed does: %s; %s", i, e.Text, e.OfSeed())
			}
			s.Stop()
		}
	})
}

// TestAnsweredCopyOpens: where a seed is refused, its recovery copy opens the value.
func TestAnsweredCopyOpens(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		stored := ringtest.NewSite(t, ack, dr, false, nil).Start(t).Ack.MustWrite(t, "k", "v")
		s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
		s.Sealer = ringtest.NewRule(t, rule.Config{Write: s.Ack.Ring, Recovery: []*keyring.Ring{s.DR.Ring}})
		ack.Set(func() {
			ack.OpErr["Decrypt"] = &kmsclient.Error{Op: "Decrypt", Reason: kmsclient.Failing, Code: "Unknown"}
		})
		if got, err := ringtest.OpenBy(s.Sealer, "k", stored); err != nil || got != "v" {
			t.Errorf("%q, %v", got, err)
		}
	})
}

// TestWrongLength: a KMS that unwraps a seed to something of another length has answered.
func TestWrongLength(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, nil)
		stored := kms.Encrypted(t, "k", "v")
		g.Start(t)
		g.MustWrite(t, "other", "v")
		kms.Set(func() { kms.Result = func(b []byte) []byte { return b[:len(b)-2] } })
		_, err := g.Read("k", stored)
		if e, ok := errors.AsType[*keyring.Error](err); !ok || !e.Responded() {
			t.Errorf("not answered: %v", err)
		}
	})
}

// TestRecheck: it has the KMS of a value contacted at once, and tells when that has happened; of a
// value of no provider it knows nothing.
func TestRecheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := ringtest.NewRig(t, ringtest.NewKMS(t, "ack"), nil).Start(t)
		stored := g.MustWrite(t, "k", "v")
		time.Sleep(5 * time.Second)
		asked := time.Now()
		if st, ok := g.Sealer.Recheck(stored); !ok || st.LastGood.After(asked) {
			t.Errorf("%+v, %v", st, ok)
		}
		time.Sleep(2 * time.Second) // of a poll interval of a minute
		if st, ok := g.Sealer.Recheck(stored); !ok || st.LastGood.Before(asked) || !st.Healthy {
			t.Errorf("%+v, %v", st, ok)
		}
		for _, none := range [][]byte{nil, []byte("plain"), bytes.Replace(stored, []byte(":ack:"), []byte(":other:"), 1), []byte(envelope.Root)} {
			if _, ok := g.Sealer.Recheck(none); ok {
				t.Errorf("%q has a KMS", none)
			}
		}
		if _, err := g.Sealer.Open(context.Background(), nil, []byte("k"), stored); err != nil {
			t.Error(err)
		}
	})
}
