package keyring

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/kubelegacy"
)

var _ LegacyReader = (*kubelegacy.Reader)(nil)

// legacyValue is a value that kube-apiserver's own code stored.
type legacyValue struct {
	Name                               string
	Type                               kubelegacy.Type
	KeyName                            string
	Secret, EtcdKey, Plaintext, Stored []byte
}

// legacyValues returns one value of each type, under a key of 32 bytes called "key1".
func legacyValues(t *testing.T) []legacyValue {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "kubelegacy", "testdata", "kubernetes-vectors.json"))
	if err != nil {
		t.Fatal(err)
	}
	var all, one []legacyValue
	if err := json.Unmarshal(b, &all); err != nil {
		t.Fatal(err)
	}
	for _, v := range all {
		if strings.HasSuffix(v.Name, ", secret") && len(v.Secret) == 32 && v.KeyName == "key1" {
			one = append(one, v)
		}
	}
	if len(one) != 3 {
		t.Fatalf("%d values", len(one))
	}
	return one
}

func (v *legacyValue) reader(t *testing.T, name string, secret []byte, source string) LegacyReader {
	t.Helper()
	r, err := kubelegacy.New(kubelegacy.Config{Type: v.Type, Keys: []kubelegacy.Key{{Name: name, Secret: secret}}, Source: source})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestLegacyReaders: what the readers of a rule open is OK for Open, whatever the rule's policy,
// and stale for Inspect, which leaves it as it is.
func TestLegacyReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRing(t, newKMS(t, "ack"), nil).start(t)
		ctx := context.Background()
		for _, v := range legacyValues(t) {
			wrong := make([]byte, 32)
			rand.Read(wrong)
			good, missing, other := v.reader(t, "key1", v.Secret, "good.yaml"), v.reader(t, "key2", v.Secret, "missing.yaml"), v.reader(t, "key1", wrong, "other.yaml")
			cut, within := v.Stored[:len(v.Stored)-1], v.Stored[:len("k8s:enc:aes")]
			for i, c := range []struct {
				what     string
				readers  []LegacyReader
				stored   []byte
				want     Kind // 0 opens
				standing ValueState
			}{
				{"good", []LegacyReader{good}, v.Stored, 0, Stale},
				{"after one without the key", []LegacyReader{missing, good}, v.Stored, 0, Stale},
				{"after one with another key of the name", []LegacyReader{other, good}, v.Stored, 0, Stale},
				{"the key is missing", []LegacyReader{missing}, v.Stored, KeyUnusable, Undecryptable},
				{"the key is missing twice", []LegacyReader{missing, missing}, v.Stored, KeyUnusable, Undecryptable},
				{"another key of the name", []LegacyReader{other}, v.Stored, Corrupt, Undecryptable},
				{"another key, and none", []LegacyReader{other, missing}, v.Stored, Corrupt, Undecryptable},
				{"none, and another key", []LegacyReader{missing, other}, v.Stored, Corrupt, Undecryptable},
				{"cut", []LegacyReader{good}, cut, Corrupt, Undecryptable},
				{"cut in the marker", []LegacyReader{good}, within, Corrupt, Undecryptable},
				{"no reader", nil, v.Stored, Plaintext, Foreign},
			} {
				for _, passthrough := range []bool{false, true} {
					obs := &events{}
					s, err := NewSealer(SealerConfig{Prefix: "/r/", Write: g.Ring, Legacy: c.readers, Passthrough: passthrough, Observer: obs})
					if err != nil {
						t.Fatal(err)
					}
					stored := bytes.Clone(c.stored)
					_, standing, err := s.Inspect(ctx, v.EtcdKey, stored)
					if standing != c.standing || (err != nil) != (c.standing == Undecryptable) || !bytes.Equal(stored, c.stored) {
						t.Errorf("%s, %s: Inspect says %s, %v", v.Name, c.what, standing, err)
					}
					got, err := s.Open(ctx, v.EtcdKey, stored)
					switch {
					case c.want == 0:
						if err != nil || !bytes.Equal(got, v.Plaintext) || obs.get("opened /r/ ok") != 1 {
							t.Errorf("%s, %s: %q, %v, %v", v.Name, c.what, got, err, obs.counts)
						}
					case c.want == Corrupt && passthrough:
						if err != nil || !bytes.Equal(got, c.stored) {
							t.Errorf("%s, %s: not handed on: %q, %v", v.Name, c.what, got, err)
						}
					default:
						wantKind(t, err, c.want)
						if !strings.Contains(err.Error(), string(v.EtcdKey)) {
							t.Errorf("%d: the text names no key: %v", i, err)
						}
						if c.want == KeyUnusable && (!strings.Contains(err.Error(), `"key1"`) || !strings.Contains(err.Error(), "missing.yaml")) {
							t.Errorf("%d: the text does not say which key is missing where: %v", i, err)
						}
					}
				}
			}
		}
	})
}

// TestLegacyOneAnswer: whatever is wrong with a value of a known key, the client reads the same
// text and the metrics count the same outcome: what differed would tell who can write to etcd how
// far a forged value came.
func TestLegacyOneAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRing(t, newKMS(t, "ack"), nil).start(t)
		for _, v := range legacyValues(t) {
			marker := len("k8s:enc:" + string(v.Type) + ":v1:key1:")
			payload := func(change func(b []byte) []byte) []byte {
				return append(bytes.Clone(v.Stored[:marker]), change(bytes.Clone(v.Stored[marker:]))...)
			}
			moved := []byte("/registry/secrets/default/another")
			texts := make(map[string]string)
			for what, c := range map[string]struct{ key, stored []byte }{
				"nothing":         {v.EtcdKey, v.Stored[:marker]},
				"cut":             {v.EtcdKey, v.Stored[:len(v.Stored)-1]},
				"a block is gone": {v.EtcdKey, v.Stored[:len(v.Stored)-16]},
				"bad padding":     {v.EtcdKey, payload(func(b []byte) []byte { b[len(b)-17] ^= 0x80; return b })},
				"no object":       {v.EtcdKey, payload(func(b []byte) []byte { b[0] ^= 1; return b })},
				"noise":           {v.EtcdKey, payload(func(b []byte) []byte { rand.Read(b); return b })},
				"moved":           {moved, v.Stored},
			} {
				obs := &events{}
				s, err := NewSealer(SealerConfig{Prefix: "/r/", Write: g.Ring, Legacy: []LegacyReader{v.reader(t, "key1", v.Secret, "keys.yaml")}, Observer: obs})
				if err != nil {
					t.Fatal(err)
				}
				_, err = s.Open(context.Background(), c.key, bytes.Clone(c.stored))
				wantKind(t, err, Corrupt)
				if obs.get("opened /r/ corrupt") != 1 || len(obs.counts) != 1 {
					t.Errorf("%s, %s: counted %v", v.Name, what, obs.counts)
				}
				texts[strings.ReplaceAll(err.Error(), string(c.key), "KEY")] = what
			}
			if len(texts) != 1 {
				t.Errorf("%s: the texts differ: %v", v.Name, texts)
			}
		}
	})
}

// TestLegacyWritingPlaintext: a rule that switches encryption off reads the values, takes them for
// stale, and does not let clients write what would be read as one.
func TestLegacyWritingPlaintext(t *testing.T) {
	for _, v := range legacyValues(t) {
		s, err := NewSealer(SealerConfig{Prefix: "/r/", AllowPlaintextReads: true, Legacy: []LegacyReader{v.reader(t, "key1", v.Secret, "")}})
		if err != nil {
			t.Fatal(err)
		}
		if got, standing, err := s.Inspect(context.Background(), v.EtcdKey, v.Stored); err != nil || standing != Stale || !bytes.Equal(got, v.Plaintext) {
			t.Errorf("%s: %q, %s, %v", v.Name, got, standing, err)
		}
		_, err = s.Seal(context.Background(), v.EtcdKey, v.Stored)
		wantKind(t, err, Refused)
		within := v.Stored[:len("k8s:enc:aes")]
		if got, err := s.Seal(context.Background(), v.EtcdKey, within); err != nil || !bytes.Equal(got, within) {
			t.Errorf("%q, %v", got, err)
		}
		if got, err := s.Open(context.Background(), v.EtcdKey, within); err != nil || !bytes.Equal(got, within) {
			t.Errorf("%q, %v", got, err)
		}
		if err := s.Health(); err != nil {
			t.Error(err)
		}
	}
}

type markerOnly string

func (m markerOnly) Marker() string { return string(m) }

func (markerOnly) Open(_, _ []byte) ([]byte, bool, error) {
	return nil, true, errors.New("never asked")
}

func TestLegacyMarkers(t *testing.T) {
	for _, m := range []markerOnly{"", "k8s:", "k8s:enc:aescbc", "k8s:enc:kms:v2:ack:", "k8s:enc:kms:", "other:"} {
		if _, err := NewSealer(SealerConfig{AllowPlaintextReads: true, Legacy: []LegacyReader{m}}); err == nil {
			t.Errorf("%q was taken", m)
		}
	}
}
