package keyring_test

import (
	"bytes"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

const (
	fakeMagic    = "age-encryption.org/v1\n"
	offlineCopy  = "safe.recovery.etcd-kms-proxy.io"
	offlineCopyN = "safe.recovery-id.etcd-kms-proxy.io"
)

// fakeOffline is public keys whose copies are the inverted seed, and private keys if unwraps is
// true.
type fakeOffline struct {
	mu      sync.Mutex
	id      string
	private bool
	err     error // of Unwrap
	calls   int   // of Unwrap
}

var _ keyring.OfflineKey = (*fakeOffline)(nil)

func (k *fakeOffline) set(change func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	change()
}

func (k *fakeOffline) ID() string {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.id
}

func (k *fakeOffline) Wrap(seed []byte) ([]byte, string, error) {
	return append([]byte(fakeMagic), inverted(seed)...), k.ID(), nil
}

func (k *fakeOffline) CanUnwrap() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.private
}

func (k *fakeOffline) Unwrap(file []byte) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.calls++
	if k.err != nil {
		return nil, k.err
	}
	return inverted(bytes.TrimPrefix(file, []byte(fakeMagic))), nil
}

func inverted(b []byte) []byte {
	b = bytes.Clone(b)
	for i := range b {
		b[i] = ^b[i]
	}
	return b
}

// offlineSite is a site whose only recovery provider is offline.
type offlineSite struct {
	*ringtest.Site
	key  *fakeOffline
	safe *keyring.Ring
	lax  *rule.Sealer // with Passthrough
}

func newOfflineSite(t *testing.T, ack *ringtest.KMS) *offlineSite {
	t.Helper()
	s := &offlineSite{Site: ringtest.NewSite(t, ack, ringtest.NewKMS(t, "dr"), false, nil), key: &fakeOffline{id: "age-1"}}
	var err error
	if s.safe, err = keyring.New(keyring.RingConfig{Provider: "safe", Offline: s.key, Cache: s.Ack.Cache}); err != nil {
		t.Fatal(err)
	}
	if err := s.Ack.SetRecovery([]*keyring.Ring{s.safe}, true); err != nil {
		t.Fatal(err)
	}
	s.Sealer = ringtest.NewRule(t, rule.Config{Write: s.Ack.Ring, Recovery: []*keyring.Ring{s.safe}, Observer: s.Events})
	s.lax = ringtest.NewRule(t, rule.Config{Write: s.Ack.Ring, Recovery: []*keyring.Ring{s.safe}, Passthrough: true})
	s.Ack.Sealer = s.Sealer
	s.Ack.Start(t)
	synctest.Wait()
	return s
}

// lose has the KMS fail for a reason, and forgets the seeds.
func (s *offlineSite) lose(kms *ringtest.KMS, reason kmsclient.Reason) {
	kms.Set(func() {
		kms.Down = ringtest.KMSError("Status", reason)
		kms.OpErr = map[string]error{"Decrypt": ringtest.KMSError("Decrypt", reason), "Encrypt": ringtest.KMSError("Encrypt", reason)}
	})
	time.Sleep(2 * time.Minute)
	synctest.Wait()
	s.Ack.EvictAll()
}

// TestOfflineCopyIsWritten checks what is stored, and that a change of the public keys makes values
// stale.
func TestOfflineCopyIsWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newOfflineSite(t, ringtest.NewKMS(t, "ack"))
		stored := s.Ack.MustWrite(t, "k", "v")
		h := ringtest.HeaderOf(t, stored)
		if !bytes.HasPrefix(h.Annotations[offlineCopy], []byte(fakeMagic)) || len(h.Annotations[offlineCopy]) != len(fakeMagic)+32 || string(h.Annotations[offlineCopyN]) != "age-1" {
			t.Errorf("the annotations are %q", h.Annotations)
		}
		if got := ringtest.StateOf(t, s.Sealer, "k", stored); got != keyring.Current {
			t.Errorf("a new value is %v", got)
		}
		if st := s.safe.State(); !st.Healthy || st.Revoked || st.CanSeal || st.KeyID != "age-1" || st.Reason != "" {
			t.Errorf("%+v", st)
		}
		s.key.set(func() { s.key.id = "age-2" })
		s.safe.Check()
		s.Ack.Check()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if got := ringtest.StateOf(t, s.Sealer, "k", stored); got != keyring.Stale {
			t.Errorf("a value for other recipients is %v", got)
		}
		if again := s.Ack.MustWrite(t, "k", "v"); ringtest.StateOf(t, s.Sealer, "k", again) != keyring.Current || string(ringtest.HeaderOf(t, again).Annotations[offlineCopyN]) != "age-2" {
			t.Error("new values are not for the new recipients")
		}
		s.Ack.MustRead(t, "k", stored, "v")
		if s.key.calls > 0 {
			t.Error("a copy was unwrapped")
		}
	})
}

// TestOfflineCopyIsRead loses the primary key. Without private keys, values are not decrypted, but
// not lost either. With them they are, also if the key is disabled, and each seed is unwrapped
// once.
func TestOfflineCopyIsRead(t *testing.T) {
	for _, reason := range []kmsclient.Reason{kmsclient.KeyGone, kmsclient.KeyNotFound, kmsclient.KeyDisabled, kmsclient.Denied, kmsclient.Unreachable} {
		t.Run(reason.String(), func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				ack := ringtest.NewKMS(t, "ack")
				s := newOfflineSite(t, ack)
				stored := s.Ack.MustWrite(t, "k", "v")
				s.lose(ack, reason)
				_, err := ringtest.OpenBy(s.Sealer, "k", stored)
				if reason == kmsclient.Unreachable {
					ringtest.WantKind(t, err, keyring.Unavailable)
				} else {
					ringtest.WantKind(t, err, keyring.KeyUnusable)
				}
				if override := reason == kmsclient.KeyDisabled || reason == kmsclient.Denied; !override && !strings.Contains(err.Error(), "--identity") {
					t.Errorf("the error does not say what decrypts the value: %v", err)
				}
				if got, err := ringtest.OpenBy(s.lax, "k", stored); err == nil {
					t.Errorf("a value that an identity decrypts is returned as stored: %q", got)
				}
				s.key.set(func() { s.key.private = true })
				time.Sleep(time.Hour) // past every pause
				for range 10 {
					time.Sleep(time.Minute)
					if got, err := ringtest.OpenBy(s.Sealer, "k", stored); err != nil || got != "v" {
						t.Fatalf("%q, %v", got, err)
					}
				}
				if got := ringtest.StateOf(t, s.Sealer, "k", stored); got != keyring.Stale {
					t.Errorf("the value is %v", got)
				}
				if s.key.calls != 1 {
					t.Errorf("the copy was unwrapped %d times", s.key.calls)
				}
				if !strings.Contains(s.Log.String(), "decrypted by recovery copies") {
					t.Error("the log does not say so")
				}
				if _, err := s.Ack.Write("k", "v"); err == nil && reason != kmsclient.Unreachable {
					t.Error("values are encrypted under the lost key")
				}
			})
		})
	}
}

// TestOfflineCopyOfOthers gives private keys that do not unwrap: they are tried now and then, and
// the value is not lost.
func TestOfflineCopyOfOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack := ringtest.NewKMS(t, "ack")
		s := newOfflineSite(t, ack)
		stored := s.Ack.MustWrite(t, "k", "v")
		s.lose(ack, kmsclient.KeyNotFound)
		s.key.set(func() { s.key.private, s.key.err = true, errors.New("made for others") })
		for range 100 {
			for _, sealer := range []*rule.Sealer{s.Sealer, s.lax} {
				_, err := ringtest.OpenBy(sealer, "k", stored)
				ringtest.WantKind(t, err, keyring.KeyUnusable)
				if !strings.Contains(err.Error(), "made for others") {
					t.Fatal(err)
				}
			}
		}
		if s.key.calls != 1 {
			t.Errorf("the copy was unwrapped %d times", s.key.calls)
		}
	})
}

// TestOfflineCopiesAndOthers checks that copies by a KMS stay unused while the key is disabled,
// though private keys are there, and that a copy of the wrong kind is not used.
func TestOfflineCopiesAndOthers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, dr := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "dr")
		s := ringtest.NewSite(t, ack, dr, false, nil).Start(t)
		stored := s.Ack.MustWrite(t, "k", "v") // with a copy by dr only
		safe, err := keyring.New(keyring.RingConfig{Provider: "safe", Offline: &fakeOffline{id: "age-1", private: true}, Cache: s.Ack.Cache})
		if err != nil {
			t.Fatal(err)
		}
		// dr is offline now, and its old copies are not.
		other, err := keyring.New(keyring.RingConfig{Provider: "dr", Offline: &fakeOffline{id: "age-1", private: true}, Cache: s.Ack.Cache})
		if err != nil {
			t.Fatal(err)
		}
		ack.Set(func() { ack.Down = ringtest.KMSError("Status", kmsclient.KeyDisabled) })
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		_, err = ringtest.OpenBy(ringtest.NewRule(t, rule.Config{Write: s.Ack.Ring, Recovery: []*keyring.Ring{s.DR.Ring, safe}}), "k", stored)
		ringtest.WantKind(t, err, keyring.KeyUnusable)
		if n := dr.Count("Decrypt"); n > 0 {
			t.Errorf("dr unwrapped %d copies of a disabled key", n)
		}
		_, err = ringtest.OpenBy(ringtest.NewRule(t, rule.Config{Write: s.Ack.Ring, Recovery: []*keyring.Ring{other}}), "k", stored)
		ringtest.WantKind(t, err, keyring.KeyUnusable)
		if !strings.Contains(err.Error(), "not an age file") {
			t.Error(err)
		}
	})
}

// TestOfflineRingOnlyCopies refuses rules that would encrypt or decrypt with an offline key.
func TestOfflineRingOnlyCopies(t *testing.T) {
	cache, err := keyring.NewCache(keyring.CacheConfig{})
	if err != nil {
		t.Fatal(err)
	}
	safe, err := keyring.New(keyring.RingConfig{Provider: "safe", Offline: &fakeOffline{id: "age-1"}, Cache: cache})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []rule.Config{
		{Write: safe, InspectOnly: true, AllowPlaintextReads: true},
		{Read: []*keyring.Ring{safe}, AllowPlaintextReads: true},
	} {
		if _, err := rule.New(c); err == nil || !strings.Contains(err.Error(), "wraps recovery copies only") {
			t.Errorf("%v", err)
		}
	}
	if _, err := keyring.New(keyring.RingConfig{Provider: "safe", Offline: &fakeOffline{}, KMS: ringtest.NewKMS(t, "a"), Cache: cache}); err == nil {
		t.Error("an offline ring with a KMS")
	}
}
