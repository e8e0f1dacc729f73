package keyring

import (
	"bytes"
	"errors"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

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

var _ OfflineKey = (*fakeOffline)(nil)

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
	*site
	key  *fakeOffline
	safe *Ring
	lax  *Sealer // with Passthrough
}

func newOfflineSite(t *testing.T, ack *fakeKMS) *offlineSite {
	t.Helper()
	s := &offlineSite{site: newSite(t, ack, newKMS(t, "dr"), false, nil), key: &fakeOffline{id: "age-1"}}
	var err error
	if s.safe, err = New(RingConfig{Provider: "safe", Offline: s.key, Cache: s.ack.cache}); err != nil {
		t.Fatal(err)
	}
	if err := s.ack.SetRecovery([]*Ring{s.safe}, true); err != nil {
		t.Fatal(err)
	}
	s.sealer = rule(t, SealerConfig{Write: s.ack.Ring, Recovery: []*Ring{s.safe}, Observer: s.events})
	s.lax = rule(t, SealerConfig{Write: s.ack.Ring, Recovery: []*Ring{s.safe}, Passthrough: true})
	s.ack.sealer = s.sealer
	s.ack.start(t)
	synctest.Wait()
	return s
}

// lose has the KMS fail for a reason, and forgets the seeds.
func (s *offlineSite) lose(kms *fakeKMS, reason kmsclient.Reason) {
	kms.set(func() {
		kms.down = kmsError("Status", reason)
		kms.opErr = map[string]error{"Decrypt": kmsError("Decrypt", reason), "Encrypt": kmsError("Encrypt", reason)}
	})
	time.Sleep(2 * time.Minute)
	synctest.Wait()
	s.ack.seeds.evict(func(*entry) bool { return true })
}

// TestOfflineCopyIsWritten checks what is stored, and that a change of the public keys makes values
// stale.
func TestOfflineCopyIsWritten(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newOfflineSite(t, newKMS(t, "ack"))
		stored := s.ack.mustSeal(t, "k", "v")
		h := headerOf(t, stored)
		if !bytes.HasPrefix(h.Annotations[offlineCopy], []byte(fakeMagic)) || len(h.Annotations[offlineCopy]) != len(fakeMagic)+32 || string(h.Annotations[offlineCopyN]) != "age-1" {
			t.Errorf("the annotations are %q", h.Annotations)
		}
		if got := standing(t, s.sealer, "k", stored); got != Current {
			t.Errorf("a new value is %v", got)
		}
		if st := s.safe.State(); !st.Healthy || st.Revoked || st.CanSeal || st.KeyID != "age-1" || st.Reason != "" {
			t.Errorf("%+v", st)
		}
		s.key.set(func() { s.key.id = "age-2" })
		s.safe.Check()
		s.ack.Check()
		time.Sleep(2 * time.Second)
		synctest.Wait()
		if got := standing(t, s.sealer, "k", stored); got != Stale {
			t.Errorf("a value for other recipients is %v", got)
		}
		if again := s.ack.mustSeal(t, "k", "v"); standing(t, s.sealer, "k", again) != Current || string(headerOf(t, again).Annotations[offlineCopyN]) != "age-2" {
			t.Error("new values are not for the new recipients")
		}
		s.ack.mustOpen(t, "k", stored, "v")
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
				ack := newKMS(t, "ack")
				s := newOfflineSite(t, ack)
				stored := s.ack.mustSeal(t, "k", "v")
				s.lose(ack, reason)
				_, err := openBy(s.sealer, "k", stored)
				if reason == kmsclient.Unreachable {
					wantKind(t, err, Unavailable)
				} else {
					wantKind(t, err, KeyUnusable)
				}
				if override := reason == kmsclient.KeyDisabled || reason == kmsclient.Denied; !override && !strings.Contains(err.Error(), "--identity") {
					t.Errorf("the error does not say what decrypts the value: %v", err)
				}
				if got, err := openBy(s.lax, "k", stored); err == nil {
					t.Errorf("a value that an identity decrypts is returned as stored: %q", got)
				}
				s.key.set(func() { s.key.private = true })
				time.Sleep(time.Hour) // past every pause
				for range 10 {
					time.Sleep(time.Minute)
					if got, err := openBy(s.sealer, "k", stored); err != nil || got != "v" {
						t.Fatalf("%q, %v", got, err)
					}
				}
				if got := standing(t, s.sealer, "k", stored); got != Stale {
					t.Errorf("the value is %v", got)
				}
				if s.key.calls != 1 {
					t.Errorf("the copy was unwrapped %d times", s.key.calls)
				}
				if !strings.Contains(s.log.String(), "decrypted by recovery copies") {
					t.Error("the log does not say so")
				}
				if _, err := s.ack.seal("k", "v"); err == nil && reason != kmsclient.Unreachable {
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
		ack := newKMS(t, "ack")
		s := newOfflineSite(t, ack)
		stored := s.ack.mustSeal(t, "k", "v")
		s.lose(ack, kmsclient.KeyNotFound)
		s.key.set(func() { s.key.private, s.key.err = true, errors.New("made for others") })
		for range 100 {
			for _, sealer := range []*Sealer{s.sealer, s.lax} {
				_, err := openBy(sealer, "k", stored)
				wantKind(t, err, KeyUnusable)
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
		ack, dr := newKMS(t, "ack"), newKMS(t, "dr")
		s := newSite(t, ack, dr, false, nil).start(t)
		stored := s.ack.mustSeal(t, "k", "v") // with a copy by dr only
		safe, err := New(RingConfig{Provider: "safe", Offline: &fakeOffline{id: "age-1", private: true}, Cache: s.ack.cache})
		if err != nil {
			t.Fatal(err)
		}
		// dr is offline now, and its old copies are not.
		other, err := New(RingConfig{Provider: "dr", Offline: &fakeOffline{id: "age-1", private: true}, Cache: s.ack.cache})
		if err != nil {
			t.Fatal(err)
		}
		ack.set(func() { ack.down = kmsError("Status", kmsclient.KeyDisabled) })
		time.Sleep(2 * time.Minute)
		synctest.Wait()
		_, err = openBy(rule(t, SealerConfig{Write: s.ack.Ring, Recovery: []*Ring{s.dr.Ring, safe}}), "k", stored)
		wantKind(t, err, KeyUnusable)
		if n := dr.count("Decrypt"); n > 0 {
			t.Errorf("dr unwrapped %d copies of a disabled key", n)
		}
		_, err = openBy(rule(t, SealerConfig{Write: s.ack.Ring, Recovery: []*Ring{other}}), "k", stored)
		wantKind(t, err, KeyUnusable)
		if !strings.Contains(err.Error(), "not an age file") {
			t.Error(err)
		}
	})
}

// TestOfflineRingOnlyCopies refuses rules that would encrypt or decrypt with an offline key.
func TestOfflineRingOnlyCopies(t *testing.T) {
	cache, err := NewCache(CacheConfig{})
	if err != nil {
		t.Fatal(err)
	}
	safe, err := New(RingConfig{Provider: "safe", Offline: &fakeOffline{id: "age-1"}, Cache: cache})
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []SealerConfig{
		{Write: safe, InspectOnly: true, AllowPlaintextReads: true},
		{Read: []*Ring{safe}, AllowPlaintextReads: true},
	} {
		if _, err := NewSealer(c); err == nil || !strings.Contains(err.Error(), "wraps recovery copies only") {
			t.Errorf("%v", err)
		}
	}
	if _, err := New(RingConfig{Provider: "safe", Offline: &fakeOffline{}, KMS: newKMS(t, "a"), Cache: cache}); err == nil {
		t.Error("an offline ring with a KMS")
	}
}
