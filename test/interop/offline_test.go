package interop

import (
	"bytes"
	"errors"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
)

// publicKeys wrap recovery copies of the greatest size, which nobody unwraps.
type publicKeys struct{}

var _ keyring.OfflineKey = publicKeys{}

func (publicKeys) ID() string { return "age-0123456789abcdef" }

func (k publicKeys) Wrap([]byte) ([]byte, string, error) {
	return append([]byte("age-encryption.org/v1\n"), make([]byte, 8<<10-22)...), k.ID(), nil
}

func (publicKeys) CanUnwrap() bool { return false }

func (publicKeys) Unwrap([]byte) ([]byte, error) { return nil, errors.New("no private key") }

// TestOfflineCopies has kube-apiserver read values with recovery copies for offline keys, by the
// primary key, as many as the limit of annotations allows.
func TestOfflineCopies(t *testing.T) {
	p := startPlugin(t, "key-1/version-1")
	p.lenient = true
	we := newOurs(t, p, provider)
	cache, err := keyring.NewCache(keyring.CacheConfig{})
	if err != nil {
		t.Fatal(err)
	}
	var safes []*keyring.Ring
	for _, name := range []string{"safe", "safe.two", "3"} {
		safe, err := keyring.New(keyring.RingConfig{Provider: name, Offline: publicKeys{}, Cache: cache})
		if err != nil {
			t.Fatal(err)
		}
		safes = append(safes, safe)
	}
	if err := we.ring.SetRecovery(safes, true); err != nil {
		t.Fatal(err)
	}
	they := newKube(t, p, provider, 1)
	for _, s := range samples() {
		t.Run(s.name, func(t *testing.T) {
			stored := we.seal(t, s.key, s.value)
			if a := decode(t, stored).Annotations; len(a) != 2*len(safes) || len(a["3.recovery.etcd-kms-proxy.io"]) != 8<<10 {
				t.Fatalf("%d annotations", len(a))
			}
			got, _, err := they.open(s.key, stored)
			if err != nil || !bytes.Equal(got, s.value) {
				t.Errorf("kube-apiserver: %d bytes, %v", len(got), err)
			}
			if got, stale, err := we.open(s.key, stored); err != nil || stale || !bytes.Equal(got, s.value) {
				t.Errorf("ours: %d bytes, stale %v, %v", len(got), stale, err)
			}
		})
	}
}
