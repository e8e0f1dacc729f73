package interop

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
)

// pair is both sides with one plugin, with a value of each kind.
type pair struct {
	plugin *plugin
	we     *ours
	they   *kube
	key    []byte
	value  []byte
	stored map[string][]byte // by writer
}

func newPair(t *testing.T) *pair {
	t.Helper()
	p := startPlugin(t, "key-1")
	p.annotate = map[string][]byte{"version.example.com": []byte("1")}
	s := &pair{plugin: p, we: newOurs(t, p, provider), they: newKube(t, p, provider, envelope.TypeSeed), key: secretKey, value: []byte("the value of a secret")}
	s.stored = map[string][]byte{
		"ours":                 s.we.seal(t, s.key, s.value),
		"kube-apiserver, seed": s.they.seal(t, s.key, s.value),
		"kube-apiserver, key":  newKube(t, p, provider, envelope.TypeKey).seal(t, s.key, s.value),
	}
	return s
}

// agree decrypts stored on both sides and fails unless both have the same result: an error, or the
// value that was written. It returns that result.
func (s *pair) agree(t *testing.T, what string, key, stored []byte) (opens bool) {
	t.Helper()
	got, _, err := s.we.open(key, stored)
	theirs, _, theirErr := s.they.open(key, stored)
	switch {
	case (err == nil) != (theirErr == nil):
		t.Errorf("%s: we say %v, kube-apiserver says %v", what, err, theirErr)
	case err == nil && (!bytes.Equal(got, s.value) || !bytes.Equal(theirs, s.value)):
		t.Errorf("%s: opened as something else than was written", what)
	}
	return err == nil
}

// refused fails unless both sides refuse stored.
func (s *pair) refused(t *testing.T, what string, key, stored []byte) {
	t.Helper()
	if s.agree(t, what, key, stored) {
		t.Errorf("%s: opens", what)
	}
}

// TestOtherEtcdKey moves a value to another key.
func TestOtherEtcdKey(t *testing.T) {
	s := newPair(t)
	for writer, stored := range s.stored {
		for _, key := range []string{"/registry/secrets/default/s2", "/registry/secrets/default/s", "/registry/secrets/default/s1/", "x"} {
			s.refused(t, writer+" moved to "+key, []byte(key), stored)
		}
		_, err := s.we.Open(context.Background(), nil, []byte("/registry/secrets/default/s2"), bytes.Clone(stored))
		if e, ok := errors.AsType[*keyring.Error](err); !ok || e.Kind != keyring.Corrupt {
			t.Errorf("%s moved: %v is not corrupt", writer, err)
		}
	}
}

// TestOtherProvider moves a value to a provider with another name on the same plugin.
func TestOtherProvider(t *testing.T) {
	s := newPair(t)
	we, they := newOurs(t, s.plugin, "other"), newKube(t, s.plugin, "other", envelope.TypeSeed)
	for writer, stored := range s.stored {
		if _, err := we.Open(context.Background(), nil, s.key, bytes.Clone(stored)); err == nil {
			t.Errorf("%s: we open another provider's value", writer)
		}
		if _, _, err := they.open(s.key, bytes.Clone(stored)); err == nil {
			t.Errorf("%s: kube-apiserver opens another provider's value", writer)
		}
	}
}

// TestWrongKMSKey has the KMS lose the key, and then use another key under its ID. Sides with a
// cached DEK seed need no KMS. Others must fail, and must decrypt everything when the key is back.
func TestWrongKMSKey(t *testing.T) {
	s := newPair(t)
	right := s.plugin.keys["key-1"]
	for _, c := range []struct {
		name   string
		change func()
		kind   keyring.Kind
	}{
		{"gone", func() { delete(s.plugin.keys, "key-1") }, keyring.KeyUnusable},
		{"other", func() { s.plugin.keys["key-1"] = s.plugin.keys["key-2"] }, keyring.Corrupt},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.plugin.rotate("key-2")
			s.plugin.set(c.change)
			fresh := *s
			fresh.we, fresh.they = newOurs(t, s.plugin, provider), newKube(t, s.plugin, provider, envelope.TypeSeed)
			for writer, stored := range s.stored {
				fresh.refused(t, writer, s.key, bytes.Clone(stored))
				_, err := fresh.we.Open(context.Background(), nil, s.key, bytes.Clone(stored))
				if e, ok := errors.AsType[*keyring.Error](err); !ok || e.Kind != c.kind {
					t.Errorf("%s: %v is not of kind %v", writer, err, c.kind)
				}
			}
			s.plugin.set(func() { s.plugin.keys["key-1"] = right })
			for writer, stored := range s.stored {
				// A refusal of the KMS is remembered for at most a poll interval.
				for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
					if _, _, err := fresh.we.open(s.key, bytes.Clone(stored)); err == nil {
						break
					}
				}
				if !fresh.agree(t, writer+" with the key back", s.key, bytes.Clone(stored)) {
					t.Errorf("%s: does not open with the key back", writer)
				}
			}
		})
	}
}

// TestWrongSecret has the KMS unwrap to a secret that is not the one that the value was encrypted
// with.
func TestWrongSecret(t *testing.T) {
	s := newPair(t)
	other := newKube(t, s.plugin, provider, envelope.TypeSeed)
	foreign := decode(t, other.seal(t, s.key, s.value)).EncryptedDEKSource
	for writer, stored := range s.stored {
		_, object, _ := envelope.Split(stored)
		o, err := envelope.Parse(object)
		if err != nil {
			t.Fatal(err)
		}
		o.Source = foreign
		s.refused(t, writer, s.key, encode(t, o))
	}
}

func encode(t testing.TB, o envelope.Object) []byte {
	t.Helper()
	marker, err := envelope.Marker(provider)
	if err != nil {
		t.Fatal(err)
	}
	stored, err := o.Append([]byte(marker))
	if err != nil {
		t.Fatal(err)
	}
	return stored
}

// TestCorruption changes every byte of a stored value in ten ways. Neither side may decrypt a
// damaged value.
func TestCorruption(t *testing.T) {
	s := newPair(t)
	changes := []byte{0xff}
	for bit := range 8 {
		changes = append(changes, 1<<bit)
	}
	for writer, stored := range s.stored {
		t.Run(writer, func(t *testing.T) {
			damaged := bytes.Clone(stored)
			for i, b := range stored {
				for _, change := range changes {
					damaged[i] = b ^ change
					s.refused(t, fmt.Sprintf("byte %d of %d xor %#02x", i, len(stored), change), s.key, damaged)
				}
				if b != 0 {
					damaged[i] = 0
					s.refused(t, fmt.Sprintf("byte %d of %d zeroed", i, len(stored)), s.key, damaged)
				}
				damaged[i] = b
			}
			if !s.agree(t, "undamaged", s.key, damaged) {
				t.Error("the undamaged value does not open any more")
			}
		})
	}
}

// TestTruncation truncates a stored value at every length, at either end, and removes every single
// byte.
func TestTruncation(t *testing.T) {
	s := newPair(t)
	for writer, stored := range s.stored {
		t.Run(writer, func(t *testing.T) {
			for n := range stored {
				s.refused(t, fmt.Sprintf("first %d of %d bytes", n, len(stored)), s.key, stored[:n])
				s.refused(t, fmt.Sprintf("without byte %d of %d", n, len(stored)), s.key, append(bytes.Clone(stored[:n]), stored[n+1:]...))
				if n > 0 {
					s.refused(t, fmt.Sprintf("from byte %d of %d", n, len(stored)), s.key, stored[n:])
				}
			}
		})
	}
}

// TestAdditions appends fields to a stored value, as protobuf allows: unknown fields change
// nothing, and the second field of a known kind replaces the first.
func TestAdditions(t *testing.T) {
	s := newPair(t)
	str := func(n protowire.Number, v string) []byte {
		return protowire.AppendString(protowire.AppendTag(nil, n, protowire.BytesType), v)
	}
	num := func(n protowire.Number, v uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(nil, n, protowire.VarintType), v)
	}
	for writer, stored := range s.stored {
		o := decode(t, stored)
		typ := uint64(o.EncryptedDEKSourceType)
		for _, c := range []struct {
			what  string
			bytes []byte
			opens bool
		}{
			{"unknown field", str(100, "new"), true},
			{"unknown number", num(6, 7), true},
			{"unknown group", []byte{0x3b, 0x3c}, true},
			{"unended group", []byte{0x3b}, false},
			{"end of no group", []byte{0x3c}, false},
			{"field number 0", []byte{0x02, 0x00}, false},
			{"wire type 6", []byte{0x0e}, false},
			{"key ID as a number", num(2, 1), true},
			{"same data", str(1, string(o.EncryptedData)), true},
			{"other data", str(1, "other"), false},
			{"no data", str(1, ""), false},
			{"same key ID", str(2, o.KeyID), true},
			{"other key ID", str(2, "key-0"), false},
			{"key ID of bad UTF-8", str(2, "\xff"), false},
			{"no key ID", str(2, ""), false},
			{"same seed", str(3, string(o.EncryptedDEKSource)), true},
			{"no seed", str(3, ""), false},
			{"same annotation", str(4, string(append(str(1, "version.example.com"), str(2, "1")...))), true},
			{"other annotation", str(4, string(append(str(1, "version.example.com"), str(2, "2")...))), false},
			{"annotation without a dot", str(4, string(append(str(1, "version"), str(2, "1")...))), false},
			{"annotation with an unknown field", str(4, string(append(append(str(1, "version.example.com"), str(2, "1")...), num(3, 1)...))), true},
			{"annotation of nothing", str(4, ""), false},
			{"same type", num(5, typ), true},
			{"other type", num(5, 1-typ), false},
			{"type of 64 bits", num(5, 1<<32|typ), true},
			{"unknown type", num(5, 2), false},
			{"negative type", num(5, 1<<64-1), false},
			{"half a tag", []byte{0x80}, false},
			{"half a string", []byte{0x0a, 0x05, 'x'}, false},
		} {
			if got := s.agree(t, writer+" and "+c.what, s.key, append(bytes.Clone(stored), c.bytes...)); got != c.opens {
				t.Errorf("%s and %s: opens is %v", writer, c.what, got)
			}
		}
	}
}
