package keyring_test

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func missingError(op, keyID string) error {
	return &kmsclient.Error{Op: op, Reason: kmsclient.KeyNotFound, Code: "Forbidden.KeyNotFound", RequestID: "req-7", KeyID: keyID}
}

// TestLostIsHandedOn: only what nothing and nobody can bring back is handed on as stored.
func TestLostIsHandedOn(t *testing.T) {
	denied, unusable, silent := ringtest.KMSError("Status", kmsclient.Denied), ringtest.KMSError("Status", kmsclient.KeyDisabled), ringtest.KMSError("Decrypt", kmsclient.Unreachable)
	for name, c := range map[string]struct {
		status, decrypt error        // of the key
		want            keyring.Kind // 0: it is handed on
		calls           int
	}{
		"the key":                            {missingError("Status", "key/1"), missingError("Decrypt", "key/1"), 0, 0},
		"the key, by its bare ID":            {missingError("Status", "key"), missingError("Decrypt", "key/1"), 0, 0},
		"an old key":                         {nil, missingError("Decrypt", "key/1"), 0, 1},
		"the key in the configuration alone": {missingError("Status", "another"), nil, keyring.KeyUnusable, 0},
		"pending deletion":                   {ringtest.GoneError("Status"), ringtest.GoneError("Decrypt"), keyring.KeyUnusable, 0},
		"an old one pending deletion":        {nil, ringtest.GoneError("Decrypt"), keyring.KeyUnusable, 1},
		"disabled":                           {unusable, unusable, keyring.KeyUnusable, 0},
		"denied":                             {denied, denied, keyring.KeyUnusable, 0},
		"silent":                             {silent, silent, keyring.Unavailable, 100},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				kms, log := ringtest.NewKMS(t, "ack"), new(ringtest.LogBuffer)
				kms.Rotate("key/1")
				stored := kms.Encrypted(t, "k", "v")
				kms.Rotate("other/1")
				g := ringtest.NewRig(t, kms, func(c *keyring.RingConfig, cc *keyring.CacheConfig) {
					versions(c, cc)
					c.Logger = slog.New(slog.NewTextHandler(log, nil))
				}).Start(t)
				pass := ringtest.NewRule(t, rule.Config{Write: g.Ring, Passthrough: true})
				kms.Set(func() {
					if c.status != nil {
						kms.OpErr["Status"] = c.status
					}
					if c.decrypt != nil {
						kms.KeyErr["key/1"] = c.decrypt
					}
				})
				time.Sleep(2*time.Minute + time.Second)
				synctest.Wait()
				kms.Set(func() { kms.Calls = map[string]int{} })
				for range 100 {
					got, err := ringtest.OpenBy(pass, "k", stored)
					if c.want != 0 {
						ringtest.WantKind(t, err, c.want)
					} else if err != nil || got != string(stored) {
						t.Fatalf("%q, %v", got, err)
					}
				}
				if n := kms.Count("Decrypt"); n != c.calls {
					t.Errorf("%d Decrypt calls for 100 reads, want %d", n, c.calls)
				}
				if n := strings.Count(log.String(), "values are returned as stored"); n != map[bool]int{true: 1}[c.want == 0] {
					t.Errorf("the log says so %d times:\n%s", n, log)
				}
				if c.want == 0 { // the policy is to hand on, and else it is an error
					_, err := g.Read("k", stored)
					ringtest.WantKind(t, err, keyring.KeyUnusable)
					if _, s, _ := g.Sealer.Inspect(context.Background(), []byte("k"), stored); s != keyring.Undecryptable {
						t.Errorf("it is %v", s)
					}
				}
				kms.Set(func() { kms.OpErr, kms.KeyErr = map[string]error{}, map[string]error{} })
				time.Sleep(10 * time.Second)
				synctest.Wait()
				if got, err := ringtest.OpenBy(pass, "k", stored); err != nil || got != "v" {
					t.Errorf("it is back: %q, %v", got, err)
				}
			})
		})
	}
}

// TestLostWithCopies: as long as a copy may open it, it is not lost.
func TestLostWithCopies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		stored := ringtest.NewSite(t, ack, dr, false, nil).Start(t).Ack.MustWrite(t, "k", "v")
		missing, invalid := missingError("Decrypt", "key-1"), ringtest.KMSError("Decrypt", kmsclient.Invalid)
		for i, c := range []struct {
			ack, dr  error
			unnamed  bool // the rule does not name the copy's provider
			handedOn bool
		}{
			{missing, missing, false, true},
			{missing, invalid, false, true},
			{invalid, missing, false, true},
			{missing, ringtest.GoneError("Decrypt"), false, false},
			{missing, ringtest.KMSError("Decrypt", kmsclient.KeyDisabled), false, false},
			{missing, ringtest.KMSError("Decrypt", kmsclient.Unreachable), false, false},
			{ringtest.KMSError("Decrypt", kmsclient.Unreachable), missing, false, false},
			{missing, missing, true, false},
		} {
			ack.Set(func() { ack.OpErr = map[string]error{}; dr.OpErr = map[string]error{} })
			s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
			config := rule.Config{Write: s.Ack.Ring, Recovery: []*keyring.Ring{s.DR.Ring}, Passthrough: true}
			if c.unnamed {
				config.Recovery = nil
			}
			pass := ringtest.NewRule(t, config)
			ack.Set(func() { ack.OpErr["Decrypt"] = c.ack })
			dr.Set(func() { dr.OpErr["Decrypt"] = c.dr })
			got, err := pass.Open(context.Background(), nil, []byte("k"), bytes.Clone(stored))
			if handedOn := err == nil && bytes.Equal(got, stored); handedOn != c.handedOn || !handedOn && err == nil {
				t.Errorf("%d: handed on is %v, %v", i, handedOn, err)
			}
			s.Stop()
		}
	})
}
