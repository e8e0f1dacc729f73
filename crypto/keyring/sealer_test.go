package keyring

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// slowDecrypt holds every Decrypt of a value back until release is closed, whatever its context
// says.
type slowDecrypt struct {
	*fakeKMS
	release chan struct{}
}

func (s *slowDecrypt) Decrypt(ctx context.Context, uid string, req *service.DecryptRequest) ([]byte, error) {
	if ctx.Value(ofContact{}) == nil {
		<-s.release
	}
	return s.fakeKMS.Decrypt(ctx, uid, req)
}

// typeZero seals under a key itself: nonce, ciphertext, tag.
func typeZero(t *testing.T, key []byte, etcdKey, value string) []byte {
	t.Helper()
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	nonce := bytes.Repeat([]byte{3}, 12)
	return gcm.Seal(nonce, nonce, []byte(value), []byte(etcdKey))
}

func TestPolicies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, old, other := newKMS(t, "ack"), newKMS(t, "old"), newKMS(t, "other")
		gAck := newRing(t, ack, nil).start(t)
		gOld := newRing(t, old, func(c *RingConfig, _ *CacheConfig) { c.ReadOnly = true }).start(t)
		gOther := newRing(t, other, nil).start(t)
		sealed := gAck.mustSeal(t, "k", "value")
		readable := old.sealed(t, "k", "value")
		foreign := gOther.mustSeal(t, "k", "value")
		tampered := bytes.Clone(sealed)
		tampered[100] ^= 1
		gone := old.sealed(t, "k", "value")
		old.rotate("key-2")
		const strict, passthrough = 1, 2
		refused := func(k Kind) string { return "error " + k.String() }
		for _, c := range []struct {
			name     string
			stored   []byte
			standing ValueState
			// plain, strict, passthrough, strict and passthrough: "open", "stored" or the error's
			// kind
			want [4]string
		}{
			{"sealed", sealed, Current, [4]string{"open", "open", "open", "open"}},
			{"of another provider of the rule", readable, Stale, [4]string{"open", "open", "open", "open"}},
			{"foreign", foreign, Foreign, [4]string{"stored", refused(Plaintext), "stored", refused(Plaintext)}},
			{"another scheme", []byte("k8s:enc:aescbc:v1:key1:xyz"), Foreign, [4]string{"stored", refused(Plaintext), "stored", refused(Plaintext)}},
			{"plaintext", []byte("hello"), Unencrypted, [4]string{"stored", refused(Plaintext), "stored", refused(Plaintext)}},
			{"empty", []byte{}, Unencrypted, [4]string{"stored", refused(Plaintext), "stored", refused(Plaintext)}},
			{"absent", nil, Unencrypted, [4]string{"stored", refused(Plaintext), "stored", refused(Plaintext)}},
			{"tampered", tampered, Undecryptable, [4]string{refused(Corrupt), refused(Corrupt), "stored", "stored"}},
			{"marker alone", []byte("k8s:enc:kms:v2:ack:"), Undecryptable, [4]string{refused(Corrupt), refused(Corrupt), "stored", "stored"}},
			{"half a marker", []byte("k8s:enc:kms:v2:ac"), Undecryptable, [4]string{refused(Corrupt), refused(Corrupt), "stored", "stored"}},
			{"garbage", []byte("k8s:enc:kms:v2:ack:garbage"), Undecryptable, [4]string{refused(Corrupt), refused(Corrupt), "stored", "stored"}},
		} {
			for i, want := range c.want {
				obs := &events{}
				s, err := NewSealer(SealerConfig{
					Prefix: "/s/", Write: gAck.Ring, Read: []*Ring{gOld.Ring}, Observer: obs,
					AllowPlaintextReads: i&strict == 0, Passthrough: i&passthrough != 0,
				})
				if err != nil {
					t.Fatal(err)
				}
				got, err := s.Open(context.Background(), []byte("k"), bytes.Clone(c.stored))
				switch want {
				case "open":
					if err != nil || string(got) != "value" {
						t.Errorf("%s, %d: %q, %v", c.name, i, got, err)
					}
				case "stored":
					if err != nil || !bytes.Equal(got, c.stored) || (got == nil) != (c.stored == nil) {
						t.Errorf("%s, %d: %q, %v", c.name, i, got, err)
					}
				default:
					e, ok := err.(*Error) //nolint:errorlint // the concrete type is what is promised
					if !ok || "error "+e.Kind.String() != want {
						t.Errorf("%s, %d: %q, %v, want %s", c.name, i, got, err, want)
					} else if !strings.Contains(e.Text, `rule "/s/"`) || !strings.Contains(e.Text, `etcd key "k"`) {
						t.Errorf("%s: the text names no rule or key: %v", c.name, err)
					}
				}
				if len(obs.counts) != 1 {
					t.Errorf("%s, %d: observed %v", c.name, i, obs.counts)
				}
				if _, standing, _ := s.Inspect(context.Background(), []byte("k"), c.stored); standing != c.standing {
					t.Errorf("%s: standing %v, want %v", c.name, standing, c.standing)
				}
			}
		}
		// Neither an outage nor a key that can be enabled again is for passing through.
		s, err := NewSealer(SealerConfig{Write: gAck.Ring, Read: []*Ring{gOld.Ring}, AllowPlaintextReads: true, Passthrough: true})
		if err != nil {
			t.Fatal(err)
		}
		for reason, kind := range map[kmsclient.Reason]Kind{kmsclient.Unreachable: Unavailable, kmsclient.Denied: KeyUnusable, kmsclient.KeyDisabled: KeyUnusable} {
			old.set(func() { old.keyErr["key-1"] = kmsError("Decrypt", reason) })
			time.Sleep(time.Minute) // what was answered before is remembered
			_, err := s.Open(context.Background(), []byte("k"), bytes.Clone(gone))
			wantKind(t, err, kind)
		}
	})
}

func TestOnlyTheOuterLayerIsOurs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRing(t, newKMS(t, "ack"), nil).start(t)
		inner := g.mustSeal(t, "k", "value")
		for _, value := range []string{string(inner), "k8s:enc:", "k8s:enc:kms:v2:ack:", "k8s:enc:kms:v2:mine:xyz", "k8s:enc:aescbc:v1:k:xyz", ""} {
			stored := g.mustSeal(t, "k", value)
			if string(stored) == value || !strings.HasPrefix(string(stored), "k8s:enc:kms:v2:ack:") {
				t.Errorf("%q was stored as %q", value, stored)
			}
			g.mustOpen(t, "k", stored, value)
		}
	})
}

func TestWritingPlaintext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		g := newRing(t, kms, nil).start(t)
		sealed := g.mustSeal(t, "k", "value")
		s, err := NewSealer(SealerConfig{Prefix: "/s/", Read: []*Ring{g.Ring}, AllowPlaintextReads: true})
		if err != nil {
			t.Fatal(err)
		}
		ctx := context.Background()
		for _, v := range []string{"", "hello", "k8s:enc:", "k8s:enc:kms:v2:other:x", "k8s:enc:kms:v2:ackx:y"} {
			stored, err := s.Seal(ctx, []byte("k"), []byte(v))
			if err != nil || string(stored) != v {
				t.Fatalf("Seal(%q) = %q, %v", v, stored, err)
			}
			got, err := s.Open(ctx, []byte("k"), bytes.Clone(stored))
			if err != nil || string(got) != v {
				t.Fatalf("Open(%q) = %q, %v", v, got, err)
			}
		}
		for _, v := range []string{string(sealed), "k8s:enc:kms:v2:ack:", "k8s:enc:kms:v2:ack:x"} {
			_, err := s.Seal(ctx, []byte("k"), []byte(v))
			wantKind(t, err, Refused)
			if strings.Contains(err.Error(), "k8s:enc") {
				t.Errorf("the text holds the value: %v", err)
			}
		}
		if got, err := s.Open(ctx, []byte("k"), bytes.Clone(sealed)); err != nil || string(got) != "value" {
			t.Errorf("Open = %q, %v", got, err)
		}
		for want, v := range map[ValueState][]byte{Current: []byte("hello"), Stale: sealed, Foreign: []byte("k8s:enc:kms:v2:other:x")} {
			if _, standing, err := s.Inspect(ctx, []byte("k"), v); standing != want || err != nil {
				t.Errorf("Inspect(%q) = %v, %v", v, standing, err)
			}
		}
		if _, err := NewSealer(SealerConfig{Read: []*Ring{g.Ring}}); err == nil {
			t.Error("a rule that may not read what it writes was accepted")
		}
		if _, err := NewSealer(SealerConfig{Write: g.Ring, Read: []*Ring{newRing(t, kms, nil).Ring}}); err == nil {
			t.Error("two rings of one provider were accepted")
		}
	})
}

// TestCorruptionOfStoredValues tries every byte and every length through the whole of the package:
// nothing opens, and nothing says that an outage is to blame.
func TestCorruptionOfStoredValues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := newKMS(t, "ack")
		g := newRing(t, kms, nil).start(t)
		stored := g.mustSeal(t, "/s/key", "a plaintext")
		s, err := NewSealer(SealerConfig{Prefix: "/s/", Write: g.Ring})
		if err != nil {
			t.Fatal(err)
		}
		lenient, err := NewSealer(SealerConfig{Prefix: "/s/", Write: g.Ring, AllowPlaintextReads: true, Passthrough: true})
		if err != nil {
			t.Fatal(err)
		}
		try := func(what string, b []byte) {
			t.Helper()
			given, before := bytes.Clone(b), bytes.Clone(b)
			if _, standing, _ := s.Inspect(context.Background(), []byte("/s/key"), given); standing == Current || standing == Stale {
				t.Errorf("%s: inspected as %s", what, standing)
			}
			// A rule that hands on what is corrupt hands it on whole.
			if got, err := lenient.Open(context.Background(), []byte("/s/key"), given); err == nil && !bytes.Equal(got, before) {
				t.Errorf("%s: handed on as %q", what, got)
			}
			got, err := s.Open(context.Background(), []byte("/s/key"), bytes.Clone(b))
			if err == nil {
				t.Errorf("%s: opens as %q", what, got)
			} else if e, ok := err.(*Error); !ok || e.Kind == Unavailable { //nolint:errorlint // the concrete type is what is promised
				t.Errorf("%s: %v", what, err)
			} else if strings.Contains(err.Error(), "a plaintext") {
				t.Errorf("%s: the text holds the value: %v", what, err)
			}
			if !bytes.Equal(before, given) {
				t.Errorf("%s: the argument was changed", what)
			}
		}
		for i := range stored {
			b := bytes.Clone(stored)
			b[i] ^= 0x10
			try(fmt.Sprintf("byte %d of %d", i, len(stored)), b)
			try(fmt.Sprintf("cut to %d of %d", i, len(stored)), stored[:i])
		}
		_, err = s.Open(context.Background(), []byte("/s/key2"), bytes.Clone(stored))
		wantKind(t, err, Corrupt)
		g.mustOpen(t, "/s/key", stored, "a plaintext")
	})
}
