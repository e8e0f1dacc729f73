package envelope

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/hkdf"
	"crypto/sha256"
	"encoding/json"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
)

var update = flag.Bool("update", false, "write the golden file again; read the diff")

// vector is one line of testdata/golden.json: everything that decides a stored value's bytes.
type vector struct {
	Name        string
	Provider    string
	EtcdKey     []byte
	Type        Type
	Secret      []byte
	KeyID       string
	Source      []byte
	AnnotKeys   []string `json:",omitempty"` // in the order of the bytes
	AnnotValues [][]byte `json:",omitempty"`
	Info        []byte   `json:",omitempty"`
	Nonce       []byte
	Plaintext   []byte
	Stored      []byte
}

func (v *vector) header() Header {
	h := Header{Type: v.Type, KeyID: v.KeyID, Source: v.Source}
	for i, k := range v.AnnotKeys {
		if h.Annotations == nil {
			h.Annotations = map[string][]byte{}
		}
		h.Annotations[k] = v.AnnotValues[i]
	}
	return h
}

// reference builds the stored bytes from the format's description with the standard library's own
// HKDF and GCM, and none of this package's code.
func (v *vector) reference(t testing.TB) []byte {
	t.Helper()
	key := v.Secret
	var data []byte
	if v.Type == TypeSeed {
		var err error
		if key, err = hkdf.Expand(sha256.New, v.Secret, string(v.Info), 32); err != nil {
			t.Fatal(err)
		}
		data = append(data, v.Info...)
	}
	block, err := aes.NewCipher(key)
	if err != nil {
		t.Fatal(err)
	}
	gcm, err := cipher.NewGCM(block)
	if err != nil {
		t.Fatal(err)
	}
	data = append(data, v.Nonce...)
	data = gcm.Seal(data, v.Nonce, v.Plaintext, v.EtcdKey)

	b := []byte("k8s:enc:kms:v2:" + v.Provider + ":")
	field := func(b []byte, n protowire.Number, value []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), value)
	}
	b = field(b, 1, data)
	b = field(b, 2, []byte(v.KeyID))
	b = field(b, 3, v.Source)
	for i, k := range v.AnnotKeys {
		b = field(b, 4, field(field(nil, 1, []byte(k)), 2, v.AnnotValues[i]))
	}
	if v.Type == TypeSeed {
		b = append(b, 0x28, 1)
	}
	return b
}

func fill(from byte, n int) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = from + byte(i)
	}
	return b
}

func vectors() []vector {
	annotations := []string{"a.example.com", "b.recovery.etcd-kms-proxy.io"}
	values := [][]byte{[]byte("one"), {}}
	return []vector{
		{Name: "seed", Provider: "ack", EtcdKey: []byte("/registry/secrets/default/s1"), Type: TypeSeed, Secret: fill(1, 32), KeyID: "key-1/version-2",
			Source: fill(100, 80), Info: fill(7, 32), Nonce: fill(200, 12), Plaintext: []byte("k8s\x00\n\x0cv1 Secret of a cluster")},
		{Name: "seed empty value", Provider: "p", EtcdKey: []byte("k"), Type: TypeSeed, Secret: fill(3, 32), KeyID: "1", Source: []byte{0}, Info: fill(9, 32), Nonce: fill(0, 12)},
		{Name: "seed annotations", Provider: "dr", EtcdKey: []byte("/a\x00\xff"), Type: TypeSeed, Secret: fill(5, 32), KeyID: "schlüssel", Source: fill(0, 200),
			AnnotKeys: annotations, AnnotValues: values, Info: fill(11, 32), Nonce: fill(1, 12), Plaintext: fill(0, 300)},
		{Name: "long seed", Provider: "dr", EtcdKey: []byte("/a"), Type: TypeSeed, Secret: fill(5, 100), KeyID: "1", Source: fill(0, 1024), Info: fill(11, 32), Nonce: fill(1, 12), Plaintext: []byte("x")},
		{Name: "key 256", Provider: "old", EtcdKey: []byte("/registry/secrets/default/s1"), Type: TypeKey, Secret: fill(1, 32), KeyID: "1", Source: fill(4, 60), Nonce: fill(200, 12), Plaintext: []byte("old value")},
		{Name: "key 128", Provider: "old", EtcdKey: []byte("/b"), Type: TypeKey, Secret: fill(1, 16), KeyID: "1", Source: fill(4, 60), Nonce: fill(200, 12), Plaintext: []byte("old value")},
		{Name: "key 192 empty value", Provider: "old", EtcdKey: []byte("/b"), Type: TypeKey, Secret: fill(1, 24), KeyID: "1", Source: fill(4, 60),
			AnnotKeys: annotations[:1], AnnotValues: values[:1], Nonce: fill(200, 12)},
	}
}

// golden returns the vectors as they stand in the golden file.
func golden(t testing.TB) []vector {
	t.Helper()
	path := filepath.Join("testdata", "golden.json")
	if *update {
		vs := vectors()
		for i := range vs {
			vs[i].Stored = vs[i].reference(t)
		}
		b, err := json.MarshalIndent(vs, "", "\t")
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, append(b, '\n'), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var vs []vector
	if err := json.Unmarshal(b, &vs); err != nil {
		t.Fatal(err)
	}
	return vs
}

func TestGolden(t *testing.T) {
	for _, v := range golden(t) {
		t.Run(v.Name, func(t *testing.T) {
			if diff := cmp.Diff(v.reference(t), v.Stored); diff != "" {
				t.Fatalf("the golden bytes are not what the description gives:\n%s", diff)
			}
			provider, object, ok := Split(v.Stored)
			if !ok || string(provider) != v.Provider {
				t.Fatalf("Split = %q, %v", provider, ok)
			}
			o, err := Parse(object)
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(v.header(), o.Header); diff != "" {
				t.Errorf("header:\n%s", diff)
			}
			seed, err := NewSeed(o.Type, v.Secret)
			if err != nil {
				t.Fatal(err)
			}
			got, err := seed.Open(nil, v.EtcdKey, o.Data)
			if err != nil || string(got) != string(v.Plaintext) {
				t.Errorf("Open = %q, %v", got, err)
			}
			marker, err := Marker(v.Provider)
			if err != nil {
				t.Fatal(err)
			}
			again, err := o.Append([]byte(marker))
			if diff := cmp.Diff(v.Stored, again); err != nil || diff != "" {
				t.Errorf("Append: %v\n%s", err, diff)
			}
		})
	}
}
