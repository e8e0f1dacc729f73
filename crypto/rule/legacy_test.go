package rule_test

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/kubelegacy"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/ringtest"
)

var _ rule.LegacyReader = (*kubelegacy.Reader)(nil)

// legacyValue is a value that kube-apiserver's own code stored.
type legacyValue struct{ clitest.KubernetesValue }

// legacyValues returns one value of each type, under a key of 32 bytes called "key1".
func legacyValues(t *testing.T) []legacyValue {
	t.Helper()
	var one []legacyValue
	for _, v := range clitest.KubernetesValues(t) {
		if strings.HasSuffix(v.Name, ", secret") && len(v.Secret) == 32 && v.KeyName == "key1" {
			one = append(one, legacyValue{v})
		}
	}
	if len(one) != 3 {
		t.Fatalf("%d values", len(one))
	}
	return one
}

func (v *legacyValue) reader(t *testing.T, name string, secret []byte, source string) rule.LegacyReader {
	t.Helper()
	r, err := kubelegacy.New(kubelegacy.Config{Type: kubelegacy.Type(v.Type), Keys: []kubelegacy.Key{{Name: name, Secret: secret}}, Source: source})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// TestLegacyReaders: what the readers of a rule open is OK for Open, whatever the rule's policy,
// and stale for Inspect, which leaves it as it is.
func TestLegacyReaders(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := ringtest.NewRig(t, ringtest.NewKMS(t, "ack"), nil).Start(t)
		ctx := context.Background()
		for _, v := range legacyValues(t) {
			wrong := make([]byte, 32)
			rand.Read(wrong)
			good, missing, other := v.reader(t, "key1", v.Secret, "good.yaml"), v.reader(t, "key2", v.Secret, "missing.yaml"), v.reader(t, "key1", wrong, "other.yaml")
			cut, within := v.Stored[:len(v.Stored)-1], v.Stored[:len("k8s:enc:aes")]
			for i, c := range []struct {
				what     string
				readers  []rule.LegacyReader
				stored   []byte
				want     keyring.Kind // 0 opens
				standing keyring.ValueState
			}{
				{"good", []rule.LegacyReader{good}, v.Stored, 0, keyring.Stale},
				{"after one without the key", []rule.LegacyReader{missing, good}, v.Stored, 0, keyring.Stale},
				{"after one with another key of the name", []rule.LegacyReader{other, good}, v.Stored, 0, keyring.Stale},
				{"the key is missing", []rule.LegacyReader{missing}, v.Stored, keyring.KeyUnusable, keyring.Undecryptable},
				{"the key is missing twice", []rule.LegacyReader{missing, missing}, v.Stored, keyring.KeyUnusable, keyring.Undecryptable},
				{"another key of the name", []rule.LegacyReader{other}, v.Stored, keyring.Corrupt, keyring.Undecryptable},
				{"another key, and none", []rule.LegacyReader{other, missing}, v.Stored, keyring.Corrupt, keyring.Undecryptable},
				{"none, and another key", []rule.LegacyReader{missing, other}, v.Stored, keyring.Corrupt, keyring.Undecryptable},
				{"cut", []rule.LegacyReader{good}, cut, keyring.Corrupt, keyring.Undecryptable},
				{"cut in the marker", []rule.LegacyReader{good}, within, keyring.Corrupt, keyring.Undecryptable},
				{"no reader", nil, v.Stored, keyring.Plaintext, keyring.Foreign},
			} {
				for _, passthrough := range []bool{false, true} {
					obs := &ringtest.Events{}
					s, err := rule.New(rule.Config{Prefix: "/r/", Write: g.Ring, Legacy: c.readers, Passthrough: passthrough, Observer: obs})
					if err != nil {
						t.Fatal(err)
					}
					stored := bytes.Clone(c.stored)
					_, standing, err := s.Inspect(ctx, v.EtcdKey, stored)
					if standing != c.standing || (err != nil) != (c.standing == keyring.Undecryptable) || !bytes.Equal(stored, c.stored) {
						t.Errorf("%s, %s: Inspect says %s, %v", v.Name, c.what, standing, err)
					}
					got, err := s.Open(ctx, nil, v.EtcdKey, stored)
					switch {
					case c.want == 0:
						if err != nil || !bytes.Equal(got, v.Plaintext) || obs.Get("opened /r/ ok") != 1 {
							t.Errorf("%s, %s: %q, %v, %v", v.Name, c.what, got, err, obs.Counts)
						}
					case c.want == keyring.Corrupt && passthrough:
						if err != nil || !bytes.Equal(got, c.stored) {
							t.Errorf("%s, %s: not handed on: %q, %v", v.Name, c.what, got, err)
						}
					default:
						ringtest.WantKind(t, err, c.want)
						if !strings.Contains(err.Error(), string(v.EtcdKey)) {
							t.Errorf("%d: the text names no key: %v", i, err)
						}
						if c.want == keyring.KeyUnusable && (!strings.Contains(err.Error(), `"key1"`) || !strings.Contains(err.Error(), "missing.yaml")) {
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
		g := ringtest.NewRig(t, ringtest.NewKMS(t, "ack"), nil).Start(t)
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
				obs := &ringtest.Events{}
				s, err := rule.New(rule.Config{Prefix: "/r/", Write: g.Ring, Legacy: []rule.LegacyReader{v.reader(t, "key1", v.Secret, "keys.yaml")}, Observer: obs})
				if err != nil {
					t.Fatal(err)
				}
				_, err = s.Open(context.Background(), nil, c.key, bytes.Clone(c.stored))
				ringtest.WantKind(t, err, keyring.Corrupt)
				if obs.Get("opened /r/ corrupt") != 1 || len(obs.Counts) != 1 {
					t.Errorf("%s, %s: counted %v", v.Name, what, obs.Counts)
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
		s, err := rule.New(rule.Config{Prefix: "/r/", AllowPlaintextReads: true, Legacy: []rule.LegacyReader{v.reader(t, "key1", v.Secret, "")}})
		if err != nil {
			t.Fatal(err)
		}
		if got, standing, err := s.Inspect(context.Background(), v.EtcdKey, v.Stored); err != nil || standing != keyring.Stale || !bytes.Equal(got, v.Plaintext) {
			t.Errorf("%s: %q, %s, %v", v.Name, got, standing, err)
		}
		_, err = s.Seal(context.Background(), v.EtcdKey, v.Stored)
		ringtest.WantKind(t, err, keyring.Refused)
		within := v.Stored[:len("k8s:enc:aes")]
		if got, err := s.Seal(context.Background(), v.EtcdKey, within); err != nil || !bytes.Equal(got, within) {
			t.Errorf("%q, %v", got, err)
		}
		if got, err := s.Open(context.Background(), nil, v.EtcdKey, within); err != nil || !bytes.Equal(got, within) {
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
		if _, err := rule.New(rule.Config{AllowPlaintextReads: true, Legacy: []rule.LegacyReader{m}}); err == nil {
			t.Errorf("%q was taken", m)
		}
	}
}
