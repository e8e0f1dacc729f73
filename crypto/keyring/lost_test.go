package keyring

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func missingError(op, keyID string) error {
	return &kmsclient.Error{Op: op, Reason: kmsclient.KeyNotFound, Code: "Forbidden.KeyNotFound", RequestID: "req-7", KeyID: keyID}
}

// TestLostIsHandedOn: only what nothing and nobody can bring back is handed on as stored.
func TestLostIsHandedOn(t *testing.T) {
	denied, unusable, silent := kmsError("Status", kmsclient.Denied), kmsError("Status", kmsclient.KeyDisabled), kmsError("Decrypt", kmsclient.Unreachable)
	for name, c := range map[string]struct {
		status, decrypt error // of the key
		want            Kind  // 0: it is handed on
		calls           int
	}{
		"the key":                            {missingError("Status", "key/1"), missingError("Decrypt", "key/1"), 0, 0},
		"the key, by its bare ID":            {missingError("Status", "key"), missingError("Decrypt", "key/1"), 0, 0},
		"an old key":                         {nil, missingError("Decrypt", "key/1"), 0, 1},
		"the key in the configuration alone": {missingError("Status", "another"), nil, KeyUnusable, 0},
		"pending deletion":                   {goneError("Status"), goneError("Decrypt"), KeyUnusable, 0},
		"an old one pending deletion":        {nil, goneError("Decrypt"), KeyUnusable, 1},
		"disabled":                           {unusable, unusable, KeyUnusable, 0},
		"denied":                             {denied, denied, KeyUnusable, 0},
		"silent":                             {silent, silent, Unavailable, 100},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				kms, log := newKMS(t, "ack"), new(logBuffer)
				kms.rotate("key/1")
				stored := kms.sealed(t, "k", "v")
				kms.rotate("other/1")
				g := newRing(t, kms, func(c *RingConfig, cc *CacheConfig) {
					versions(c, cc)
					c.Logger = slog.New(slog.NewTextHandler(log, nil))
				}).start(t)
				pass := rule(t, SealerConfig{Write: g.Ring, Passthrough: true})
				kms.set(func() {
					if c.status != nil {
						kms.opErr["Status"] = c.status
					}
					if c.decrypt != nil {
						kms.keyErr["key/1"] = c.decrypt
					}
				})
				time.Sleep(2*time.Minute + time.Second)
				synctest.Wait()
				kms.set(func() { kms.calls = map[string]int{} })
				for range 100 {
					got, err := openBy(pass, "k", stored)
					if c.want != 0 {
						wantKind(t, err, c.want)
					} else if err != nil || got != string(stored) {
						t.Fatalf("%q, %v", got, err)
					}
				}
				if n := kms.count("Decrypt"); n != c.calls {
					t.Errorf("%d Decrypt calls for 100 reads, want %d", n, c.calls)
				}
				if n := strings.Count(log.String(), "values are returned as stored"); n != map[bool]int{true: 1}[c.want == 0] {
					t.Errorf("the log says so %d times:\n%s", n, log)
				}
				if c.want == 0 { // the policy is to hand on, and else it is an error
					_, err := g.open("k", stored)
					wantKind(t, err, KeyUnusable)
					if _, s, _ := g.sealer.Inspect(context.Background(), []byte("k"), stored); s != Undecryptable {
						t.Errorf("it is %v", s)
					}
				}
				kms.set(func() { kms.opErr, kms.keyErr = map[string]error{}, map[string]error{} })
				time.Sleep(10 * time.Second)
				synctest.Wait()
				if got, err := openBy(pass, "k", stored); err != nil || got != "v" {
					t.Errorf("it is back: %q, %v", got, err)
				}
			})
		})
	}
}

// TestLostWithCopies: as long as a copy may open it, it is not lost.
func TestLostWithCopies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		stored := newSite(t, ack, dr, false, nil).start(t).ack.mustSeal(t, "k", "v")
		missing, invalid := missingError("Decrypt", "key-1"), kmsError("Decrypt", kmsclient.Invalid)
		for i, c := range []struct {
			ack, dr  error
			unnamed  bool // the rule does not name the copy's provider
			handedOn bool
		}{
			{missing, missing, false, true},
			{missing, invalid, false, true},
			{invalid, missing, false, true},
			{missing, goneError("Decrypt"), false, false},
			{missing, kmsError("Decrypt", kmsclient.KeyDisabled), false, false},
			{missing, kmsError("Decrypt", kmsclient.Unreachable), false, false},
			{kmsError("Decrypt", kmsclient.Unreachable), missing, false, false},
			{missing, missing, true, false},
		} {
			ack.set(func() { ack.opErr = map[string]error{}; dr.opErr = map[string]error{} })
			s := newSite(t, ack, dr, false, nil).start(t)
			config := SealerConfig{Write: s.ack.Ring, Recovery: []*Ring{s.dr.Ring}, Passthrough: true}
			if c.unnamed {
				config.Recovery = nil
			}
			pass := rule(t, config)
			ack.set(func() { ack.opErr["Decrypt"] = c.ack })
			dr.set(func() { dr.opErr["Decrypt"] = c.dr })
			got, err := pass.Open(context.Background(), []byte("k"), bytes.Clone(stored))
			if handedOn := err == nil && bytes.Equal(got, stored); handedOn != c.handedOn || !handedOn && err == nil {
				t.Errorf("%d: handed on is %v, %v", i, handedOn, err)
			}
			s.stop()
		}
	})
}
