package alibaba

import (
	"strings"
	"testing"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestRotationIsSeenAndOldVersionsOpen(t *testing.T) {
	d, b := newPair(t)
	before, err := b.GenerateDataKey(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	version := d.Rotate(kmsdouble.DefaultKeyID)
	want := kmsdouble.DefaultKeyID + "/" + version
	if status, err := b.Status(t.Context()); err != nil || status.KeyID != want {
		t.Errorf("status = %+v, %v; want key ID %s", status, err, want)
	}
	if after, err := b.Encrypt(t.Context(), "", []byte("x")); err != nil || after.KeyID != want {
		t.Errorf("encrypt = %+v, %v; want key ID %s", after, err, want)
	}
	if _, err := b.Decrypt(t.Context(), "", &service.DecryptRequest{Ciphertext: before.Ciphertext, KeyID: before.KeyID}); err != nil {
		t.Errorf("old version: %v", err)
	}
	// A value that claims to be of another version than it is.
	_, err = b.Decrypt(t.Context(), "", &service.DecryptRequest{Ciphertext: before.Ciphertext, KeyID: want})
	if e := asError(t, err); e.Class() != kmsclient.ClassContract || e.KeyID != want {
		t.Errorf("forged version: %+v", e)
	}
}

func TestAliasMovedToAnotherKey(t *testing.T) {
	d := kmsdouble.New(t, kmsdouble.Config{})
	b := newBackend(t, d, func(c *Config) { c.KeyID = kmsdouble.DefaultAlias })
	old, err := b.GenerateDataKey(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := d.AddKey(kmsdouble.KeyConfig{ID: "key-second", Alias: kmsdouble.DefaultAlias}); err != nil {
		t.Fatal(err)
	}
	if status, err := b.Status(t.Context()); err != nil || !strings.HasPrefix(status.KeyID, "key-second/") {
		t.Errorf("status = %+v, %v", status, err)
	}
	if _, err := b.Decrypt(t.Context(), "", &service.DecryptRequest{Ciphertext: old.Ciphertext, KeyID: old.KeyID}); err != nil {
		t.Errorf("value of the first key: %v", err)
	}
}

func TestKeyStates(t *testing.T) {
	for state, code := range map[kmsdouble.State]string{
		kmsdouble.Disabled: "Rejected.Disabled", kmsdouble.PendingDeletion: "Rejected.PendingDeletion", kmsdouble.PendingImport: "Rejected.PendingImport",
	} {
		t.Run(string(state), func(t *testing.T) {
			d, b := newPair(t)
			key, err := b.GenerateDataKey(t.Context(), "")
			if err != nil {
				t.Fatal(err)
			}
			d.SetState(kmsdouble.DefaultKeyID, state)
			for op, err := range allOperations(t, b, key) {
				e := asError(t, err)
				if e.Class() != kmsclient.ClassKeyUnusable || e.Reason.Gone() == (state == kmsdouble.Disabled) || e.Code != code || e.Op != op || e.RequestID == "" || !strings.HasPrefix(e.KeyID, kmsdouble.DefaultKeyID) {
					t.Errorf("%s: %+v", op, e)
				}
			}
			info, err := b.Describe(t.Context())
			if err != nil || info.State != string(state) {
				t.Errorf("describe = %+v, %v", info, err)
			}
			if pending := state == kmsdouble.PendingDeletion; pending != !info.DeleteAt.IsZero() {
				t.Errorf("DeleteAt = %v", info.DeleteAt)
			}
			d.SetState(kmsdouble.DefaultKeyID, kmsdouble.Enabled)
			for op, err := range allOperations(t, b, key) {
				if err != nil {
					t.Errorf("%s after the key was enabled: %v", op, err)
				}
			}
		})
	}
	t.Run("gone", func(t *testing.T) {
		d, b := newPair(t)
		key, err := b.GenerateDataKey(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		d.RemoveKey(kmsdouble.DefaultKeyID)
		for op, err := range allOperations(t, b, key) {
			if e := asError(t, err); e.Reason != kmsclient.KeyNotFound || e.Code != "Forbidden.KeyNotFound" {
				t.Errorf("%s: %+v", op, e)
			}
		}
	})
}

// allOperations runs each operation once and returns its error by the name that the error must
// have.
func allOperations(t *testing.T, b *Backend, key *kmsclient.DataKey) map[string]error {
	t.Helper()
	errs := map[string]error{}
	_, errs["GenerateDataKey"] = b.GenerateDataKey(t.Context(), "")
	_, errs["Encrypt"] = b.Encrypt(t.Context(), "", []byte("x"))
	_, errs["Decrypt"] = b.Decrypt(t.Context(), "", &service.DecryptRequest{Ciphertext: key.Ciphertext, KeyID: key.KeyID})
	_, errs["Status"] = b.Status(t.Context())
	return errs
}

// TestAliasLeadsNowhere tells the loss of a name from that of a key.
func TestAliasLeadsNowhere(t *testing.T) {
	for _, keyID := range []string{kmsdouble.DefaultAlias, "acs:kms:cn-hangzhou:154035569884:" + kmsdouble.DefaultAlias, kmsdouble.DefaultKeyID} {
		for name, lose := range map[string]func(*kmsdouble.Double){
			"removed":   func(d *kmsdouble.Double) { d.RemoveAlias(kmsdouble.DefaultAlias) },
			"elsewhere": func(d *kmsdouble.Double) { d.SetAlias(kmsdouble.DefaultAlias, "key-none") },
			"the key":   func(d *kmsdouble.Double) { d.RemoveKey(kmsdouble.DefaultKeyID) },
		} {
			t.Run(keyID+"/"+name, func(t *testing.T) {
				d := kmsdouble.New(t, kmsdouble.Config{})
				b := newBackend(t, d, func(c *Config) { c.KeyID = keyID })
				key := mustDataKey(t, b)
				lose(d)
				for op, call := range operations(b, key) {
					err := call(t.Context())
					if keyID == kmsdouble.DefaultKeyID && name != "the key" || op == "Decrypt" && name != "the key" {
						if err != nil {
							t.Errorf("%s: %v", op, err)
						}
						continue
					}
					alias := keyID != kmsdouble.DefaultKeyID && op != "Decrypt"
					want := kmsclient.KeyNotFound
					if alias {
						want = kmsclient.AliasNotFound
					}
					if e := asError(t, err); e.Reason != want || alias != strings.Contains(e.Detail, "alias") {
						t.Errorf("%s: %+v", op, e)
					}
				}
			})
		}
	}
}
