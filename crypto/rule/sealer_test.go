package rule_test

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestPolicies(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ack, old, other := ringtest.NewKMS(t, "ack"), ringtest.NewKMS(t, "old"), ringtest.NewKMS(t, "other")
		gAck := ringtest.NewRig(t, ack, nil).Start(t)
		gOld := ringtest.NewRig(t, old, func(c *keyring.RingConfig, _ *keyring.CacheConfig) { c.ReadOnly = true }).Start(t)
		gOther := ringtest.NewRig(t, other, nil).Start(t)
		sealed := gAck.MustWrite(t, "k", "value")
		readable := old.Encrypted(t, "k", "value")
		foreign := gOther.MustWrite(t, "k", "value")
		tampered := bytes.Clone(sealed)
		tampered[100] ^= 1
		gone := old.Encrypted(t, "k", "value")
		old.Rotate("key-2")
		const strict, passthrough = 1, 2
		refused := func(k keyring.Kind) string { return "error " + k.String() }
		for _, c := range []struct {
			name     string
			stored   []byte
			standing keyring.ValueState
			// plain, strict, passthrough, strict and passthrough: "open", "stored" or the error's
			// kind
			want [4]string
		}{
			{"sealed", sealed, keyring.Current, [4]string{"open", "open", "open", "open"}},
			{"of another provider of the rule", readable, keyring.Stale, [4]string{"open", "open", "open", "open"}},
			{"foreign", foreign, keyring.Foreign, [4]string{"stored", refused(keyring.Plaintext), "stored", refused(keyring.Plaintext)}},
			{"another scheme", []byte("k8s:enc:aescbc:v1:key1:xyz"), keyring.Foreign, [4]string{"stored", refused(keyring.Plaintext), "stored", refused(keyring.Plaintext)}},
			{"plaintext", []byte("hello"), keyring.Unencrypted, [4]string{"stored", refused(keyring.Plaintext), "stored", refused(keyring.Plaintext)}},
			{"empty", []byte{}, keyring.Unencrypted, [4]string{"stored", refused(keyring.Plaintext), "stored", refused(keyring.Plaintext)}},
			{"absent", nil, keyring.Unencrypted, [4]string{"stored", refused(keyring.Plaintext), "stored", refused(keyring.Plaintext)}},
			{"tampered", tampered, keyring.Undecryptable, [4]string{refused(keyring.Corrupt), refused(keyring.Corrupt), "stored", "stored"}},
			{"marker alone", []byte("k8s:enc:kms:v2:ack:"), keyring.Undecryptable, [4]string{refused(keyring.Corrupt), refused(keyring.Corrupt), "stored", "stored"}},
			{"half a marker", []byte("k8s:enc:kms:v2:ac"), keyring.Undecryptable, [4]string{refused(keyring.Corrupt), refused(keyring.Corrupt), "stored", "stored"}},
			{"garbage", []byte("k8s:enc:kms:v2:ack:garbage"), keyring.Undecryptable, [4]string{refused(keyring.Corrupt), refused(keyring.Corrupt), "stored", "stored"}},
		} {
			for i, want := range c.want {
				obs := &ringtest.Events{}
				s, err := rule.New(rule.Config{
					Prefix: "/s/", Write: gAck.Ring, Read: []*keyring.Ring{gOld.Ring}, Observer: obs,
					AllowPlaintextReads: i&strict == 0, Passthrough: i&passthrough != 0,
				})
				if err != nil {
					t.Fatal(err)
				}
				got, err := s.Open(context.Background(), []byte("dst"), []byte("k"), bytes.Clone(c.stored))
				got, begins := bytes.CutPrefix(got, []byte("dst"))
				if err == nil && !begins {
					t.Errorf("%s, %d: not appended", c.name, i)
				}
				switch want {
				case "open":
					if err != nil || string(got) != "value" {
						t.Errorf("%s, %d: %q, %v", c.name, i, got, err)
					}
				case "stored":
					if err != nil || !bytes.Equal(got, c.stored) {
						t.Errorf("%s, %d: %q, %v", c.name, i, got, err)
					}
				default:
					e, ok := err.(*keyring.Error) //nolint:errorlint // the concrete type is what is promised
					if !ok || "error "+e.Kind.String() != want {
						t.Errorf("%s, %d: %q, %v, want %s", c.name, i, got, err, want)
					} else if !strings.Contains(e.Text, `rule "/s/"`) || !strings.Contains(e.Text, `etcd key "k"`) {
						t.Errorf("%s: the text names no rule or key: %v", c.name, err)
					}
				}
				if len(obs.Counts) != 1 {
					t.Errorf("%s, %d: observed %v", c.name, i, obs.Counts)
				}
				if _, standing, _ := s.Inspect(context.Background(), []byte("k"), c.stored); standing != c.standing {
					t.Errorf("%s: standing %v, want %v", c.name, standing, c.standing)
				}
			}
		}
		// Neither an outage nor a key that can be enabled again is for passing through.
		s, err := rule.New(rule.Config{Write: gAck.Ring, Read: []*keyring.Ring{gOld.Ring}, AllowPlaintextReads: true, Passthrough: true})
		if err != nil {
			t.Fatal(err)
		}
		for reason, kind := range map[kmsclient.Reason]keyring.Kind{kmsclient.Unreachable: keyring.Unavailable, kmsclient.Denied: keyring.KeyUnusable, kmsclient.KeyDisabled: keyring.KeyUnusable} {
			old.Set(func() { old.KeyErr["key-1"] = ringtest.KMSError("Decrypt", reason) })
			time.Sleep(time.Minute) // what was answered before is remembered
			_, err := s.Open(context.Background(), nil, []byte("k"), bytes.Clone(gone))
			ringtest.WantKind(t, err, kind)
		}
	})
}

func TestOnlyTheOuterLayerIsOurs(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := ringtest.NewRig(t, ringtest.NewKMS(t, "ack"), nil).Start(t)
		inner := g.MustWrite(t, "k", "value")
		for _, value := range []string{string(inner), "k8s:enc:", "k8s:enc:kms:v2:ack:", "k8s:enc:kms:v2:mine:xyz", "k8s:enc:aescbc:v1:k:xyz", ""} {
			stored := g.MustWrite(t, "k", value)
			if string(stored) == value || !strings.HasPrefix(string(stored), "k8s:enc:kms:v2:ack:") {
				t.Errorf("%q was stored as %q", value, stored)
			}
			g.MustRead(t, "k", stored, value)
		}
	})
}

func TestWritingPlaintext(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		sealed := g.MustWrite(t, "k", "value")
		s, err := rule.New(rule.Config{Prefix: "/s/", Read: []*keyring.Ring{g.Ring}, AllowPlaintextReads: true})
		if err != nil {
			t.Fatal(err)
		}
		ctx := context.Background()
		for _, v := range []string{"", "hello", "k8s:enc:", "k8s:enc:kms:v2:other:x", "k8s:enc:kms:v2:ackx:y"} {
			stored, err := s.Seal(ctx, []byte("k"), []byte(v))
			if err != nil || string(stored) != v {
				t.Fatalf("Seal(%q) = %q, %v", v, stored, err)
			}
			got, err := s.Open(ctx, nil, []byte("k"), bytes.Clone(stored))
			if err != nil || string(got) != v {
				t.Fatalf("Open(%q) = %q, %v", v, got, err)
			}
		}
		for _, v := range []string{string(sealed), "k8s:enc:kms:v2:ack:", "k8s:enc:kms:v2:ack:x"} {
			_, err := s.Seal(ctx, []byte("k"), []byte(v))
			ringtest.WantKind(t, err, keyring.Refused)
			if strings.Contains(err.Error(), "k8s:enc") {
				t.Errorf("the text holds the value: %v", err)
			}
		}
		if got, err := s.Open(ctx, nil, []byte("k"), bytes.Clone(sealed)); err != nil || string(got) != "value" {
			t.Errorf("Open = %q, %v", got, err)
		}
		for want, v := range map[keyring.ValueState][]byte{keyring.Current: []byte("hello"), keyring.Stale: sealed, keyring.Foreign: []byte("k8s:enc:kms:v2:other:x")} {
			if _, standing, err := s.Inspect(ctx, []byte("k"), v); standing != want || err != nil {
				t.Errorf("Inspect(%q) = %v, %v", v, standing, err)
			}
		}
		if _, err := rule.New(rule.Config{Read: []*keyring.Ring{g.Ring}}); err == nil {
			t.Error("a rule that may not read what it writes was accepted")
		}
		if _, err := rule.New(rule.Config{Write: g.Ring, Read: []*keyring.Ring{ringtest.NewRig(t, kms, nil).Ring}}); err == nil {
			t.Error("two rings of one provider were accepted")
		}
	})
}

// TestCorruptionOfStoredValues tries every byte and every length through the whole of the package:
// nothing opens, and nothing says that an outage is to blame.
func TestCorruptionOfStoredValues(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		kms := ringtest.NewKMS(t, "ack")
		g := ringtest.NewRig(t, kms, nil).Start(t)
		stored := g.MustWrite(t, "/s/key", "a plaintext")
		s, err := rule.New(rule.Config{Prefix: "/s/", Write: g.Ring})
		if err != nil {
			t.Fatal(err)
		}
		lenient, err := rule.New(rule.Config{Prefix: "/s/", Write: g.Ring, AllowPlaintextReads: true, Passthrough: true})
		if err != nil {
			t.Fatal(err)
		}
		try := func(what string, b []byte) {
			t.Helper()
			given, before := bytes.Clone(b), bytes.Clone(b)
			if _, standing, _ := s.Inspect(context.Background(), []byte("/s/key"), given); standing == keyring.Current || standing == keyring.Stale {
				t.Errorf("%s: inspected as %s", what, standing)
			}
			// A rule that hands on what is corrupt hands it on whole.
			if got, err := lenient.Open(context.Background(), nil, []byte("/s/key"), given); err == nil && !bytes.Equal(got, before) {
				t.Errorf("%s: handed on as %q", what, got)
			}
			got, err := s.Open(context.Background(), nil, []byte("/s/key"), bytes.Clone(b))
			if err == nil {
				t.Errorf("%s: opens as %q", what, got)
			} else if e, ok := err.(*keyring.Error); !ok || e.Kind == keyring.Unavailable { //nolint:errorlint // the concrete type is what is promised
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
		_, err = s.Open(context.Background(), nil, []byte("/s/key2"), bytes.Clone(stored))
		ringtest.WantKind(t, err, keyring.Corrupt)
		g.MustRead(t, "/s/key", stored, "a plaintext")
	})
}
