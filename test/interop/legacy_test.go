package interop

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/rand"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"k8s.io/apiserver/pkg/storage/value"
	aestransformer "k8s.io/apiserver/pkg/storage/value/encrypt/aes"
	"k8s.io/apiserver/pkg/storage/value/encrypt/secretbox"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/kubelegacy"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
)

// legacyVectorFile contains what k8s.io/apiserver's aescbc, aesgcm and secretbox transformers
// wrote.
var legacyVectorFile = filepath.Join("..", "..", "crypto", "kubelegacy", "testdata", "kubernetes-vectors.json")

// legacyVector has the fields of crypto/kubelegacy's own test.
type legacyVector struct {
	Name      string
	Type      kubelegacy.Type
	KeyName   string
	Secret    []byte
	EtcdKey   []byte
	Plaintext []byte
	Stored    []byte
}

// kubeLegacy returns kube-apiserver's transformer of a type, with the marker and the name of the
// key in front, as in its encryption configuration.
func kubeLegacy(tb testing.TB, typ kubelegacy.Type, keyName string, secret []byte) value.Transformer {
	tb.Helper()
	var inner value.Transformer
	if typ == kubelegacy.Secretbox {
		inner = secretbox.NewSecretboxTransformer([32]byte(secret))
	} else {
		block, err := aes.NewCipher(secret)
		if err != nil {
			tb.Fatal(err)
		}
		if inner = aestransformer.NewCBCTransformer(block); typ == kubelegacy.AESGCM {
			if inner, err = aestransformer.NewGCMTransformer(block); err != nil {
				tb.Fatal(err)
			}
		}
	}
	inner = value.NewPrefixTransformers(errors.New("no matching key"), value.PrefixTransformer{Prefix: []byte(keyName + ":"), Transformer: inner})
	return value.NewPrefixTransformers(errors.New("no matching prefix"), value.PrefixTransformer{Prefix: []byte("k8s:enc:" + string(typ) + ":v1:"), Transformer: inner})
}

// makeLegacyVectors has k8s.io/apiserver encrypt what it also stores: objects.
func makeLegacyVectors(t *testing.T) []legacyVector {
	t.Helper()
	var vs []legacyVector
	for _, typ := range []kubelegacy.Type{kubelegacy.AESCBC, kubelegacy.AESGCM, kubelegacy.Secretbox} {
		for _, size := range typ.KeySizes() {
			secret := make([]byte, size)
			rand.Read(secret)
			for _, c := range []struct{ name, key, etcdKey, value string }{
				{"secret", "key1", "/registry/secrets/default/s1", storedSecret(t, "default", "s1", []byte("bytes\xff"))},
				{"json", "key:1", "/registry/example.com/widgets/ns/w", storedWidget(t, false)},
				{"cbor", "schlüssel", "/registry/example.com/widgets/ns/w", storedWidget(t, true)},
				{"whole blocks", "k", "/registry/secrets/default/s2", wholeBlocks(t, "default", "s2")},
				{"no name", "k", "/registry/ranges/serviceips", storedSecret(t, "", "", []byte("r"))},
				{"2 KiB", "key1", "/a\x00\xff/ns/s3", storedSecret(t, "ns", "s3", bytes.Repeat([]byte("\x00\x01\xfe\xff"), 512))},
			} {
				v := legacyVector{Name: string(typ) + ", " + c.name, Type: typ, KeyName: c.key, Secret: secret, EtcdKey: []byte(c.etcdKey), Plaintext: []byte(c.value)}
				var err error
				if v.Stored, err = kubeLegacy(t, typ, c.key, secret).TransformToStorage(context.Background(), v.Plaintext, value.DefaultContext(v.EtcdKey)); err != nil {
					t.Fatal(err)
				}
				vs = append(vs, v)
			}
		}
	}
	return vs
}

// TestLegacyVectors decrypts the committed vectors with k8s.io/apiserver's code and, through a
// strict rule, with ours.
func TestLegacyVectors(t *testing.T) {
	if *update {
		b, err := json.MarshalIndent(makeLegacyVectors(t), "", "\t")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(legacyVectorFile, append(b, '\n'), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(legacyVectorFile)
	if err != nil {
		t.Fatal(err)
	}
	var vs []legacyVector
	if err := json.Unmarshal(b, &vs); err != nil {
		t.Fatal(err)
	}
	if len(vs) != 42 {
		t.Errorf("%d vectors", len(vs))
	}
	we := newOurs(t, startPlugin(t, "1"), provider)
	for _, v := range vs {
		theirs := kubeLegacy(t, v.Type, v.KeyName, v.Secret)
		got, _, err := theirs.TransformFromStorage(context.Background(), v.Stored, value.DefaultContext(v.EtcdKey))
		if err != nil || !bytes.Equal(got, v.Plaintext) {
			t.Errorf("%s: kube-apiserver opens %q, %v", v.Name, got, err)
		}
		same(t, v.Name+", read by us", v.Plaintext, true)(we.reading(t, v.Type, v.KeyName, v.Secret).open(v.EtcdKey, v.Stored))
	}
}

// reading returns a rule that encrypts like o and also reads the values of one of kube-apiserver's
// own providers.
func (o *ours) reading(tb testing.TB, typ kubelegacy.Type, keyName string, secret []byte) *ours {
	tb.Helper()
	reader, err := kubelegacy.New(kubelegacy.Config{Type: typ, Keys: []kubelegacy.Key{{Name: keyName, Secret: secret}}, Source: "key file"})
	if err != nil {
		tb.Fatal(err)
	}
	s, err := rule.New(rule.Config{Prefix: "/registry/", Write: o.ring, Legacy: []rule.LegacyReader{reader}})
	if err != nil {
		tb.Fatal(err)
	}
	return &ours{Sealer: s, ring: o.ring}
}

// TestLegacyTampering has both sides decrypt damaged values: we must refuse what kube-apiserver
// refuses. kube-apiserver may accept values of aescbc, which has no integrity, that we refuse
// because they are no objects. If both accept a value, they must decrypt it to the same bytes.
func TestLegacyTampering(t *testing.T) {
	we := newOurs(t, startPlugin(t, "1"), provider)
	plaintext := []byte("k8s\x00\n\x0c\n\x02v1\x12\x06Secret\x12\x20and the bytes of it")
	for _, typ := range []kubelegacy.Type{kubelegacy.AESCBC, kubelegacy.AESGCM, kubelegacy.Secretbox} {
		secret := make([]byte, 32)
		rand.Read(secret)
		theirs, ours := kubeLegacy(t, typ, "key1", secret), we.reading(t, typ, "key1", secret)
		stored, err := theirs.TransformToStorage(context.Background(), plaintext, value.DefaultContext(secretKey))
		if err != nil {
			t.Fatal(err)
		}
		both := func(what string, key, stored []byte) {
			t.Helper()
			theyRead, _, theirErr := kubeOpen(theirs, key, stored)
			weRead, _, ourErr := ours.open(key, stored)
			switch {
			case ourErr == nil && (theirErr != nil || !bytes.Equal(theyRead, weRead)):
				t.Errorf("%s, %s: we read %q, kube-apiserver %q, %v", typ, what, weRead, theyRead, theirErr)
			case ourErr != nil && theirErr == nil && typ != kubelegacy.AESCBC:
				t.Errorf("%s, %s: kube-apiserver reads it, we do not: %v", typ, what, ourErr)
			}
		}
		both("as it is", secretKey, stored)
		both("moved", []byte("/registry/secrets/default/s2"), stored)
		for i := range stored {
			both("cut", secretKey, stored[:i])
			bad := bytes.Clone(stored)
			for bit := range 8 {
				bad[i] = stored[i] ^ 1<<bit
				both("altered", secretKey, bad)
			}
		}
	}
}

// kubeOpen decrypts with kube-apiserver's code, which panics on an aescbc value that consists only
// of its IV.
func kubeOpen(t value.Transformer, key, stored []byte) (plaintext []byte, stale bool, err error) {
	defer func() {
		if recover() != nil {
			err = errors.New("panic")
		}
	}()
	return t.TransformFromStorage(context.Background(), stored, value.DefaultContext(key))
}
