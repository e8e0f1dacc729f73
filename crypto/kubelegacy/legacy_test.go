package kubelegacy

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// vector is a value that k8s.io/apiserver stored. test/interop makes them, with -update.
type vector struct {
	Name      string
	Type      Type
	KeyName   string
	Secret    []byte
	EtcdKey   []byte
	Plaintext []byte
	Stored    []byte
}

func vectors(tb testing.TB) []vector {
	tb.Helper()
	b, err := os.ReadFile(filepath.Join("testdata", "kubernetes-vectors.json"))
	if err != nil {
		tb.Fatal(err)
	}
	var vs []vector
	if err := json.Unmarshal(b, &vs); err != nil {
		tb.Fatal(err)
	}
	if len(vs) != 42 {
		tb.Fatalf("%d vectors", len(vs))
	}
	return vs
}

func reader(tb testing.TB, typ Type, keys ...Key) *Reader {
	tb.Helper()
	r, err := New(Config{Type: typ, Keys: keys, Source: "file"})
	if err != nil {
		tb.Fatal(err)
	}
	return r
}

func (v vector) reader(tb testing.TB) *Reader {
	tb.Helper()
	return reader(tb, v.Type, Key{v.KeyName, v.Secret})
}

func TestVectors(t *testing.T) {
	for _, v := range vectors(t) {
		r, stored, key := v.reader(t), bytes.Clone(v.Stored), bytes.Clone(v.EtcdKey)
		got, known, err := r.Open(key, stored)
		if err != nil || !known || !bytes.Equal(got, v.Plaintext) {
			t.Errorf("%s: %q, %v, %v", v.Name, got, known, err)
		}
		if !bytes.HasPrefix(v.Stored, []byte(r.Marker())) || !bytes.Equal(stored, v.Stored) || !bytes.Equal(key, v.EtcdKey) {
			t.Errorf("%s: the arguments were changed, or the marker is wrong", v.Name)
		}
	}
}

// TestDamage: every truncation and every altered byte of the payload fails, with one and the same
// error whatever went wrong; of aescbc, what does open is an object still.
func TestDamage(t *testing.T) {
	for _, v := range vectors(t) {
		r := v.reader(t)
		start := len(r.Marker()) + len(v.KeyName) + 1
		refuse := func(what string, key, stored []byte) {
			t.Helper()
			got, known, err := r.Open(key, stored)
			if o, isObject := parseObject(got); v.Type == AESCBC && err == nil && isObject && o.fits(key) {
				return // it has no integrity
			}
			if got != nil || !known || err != errCorrupt { //nolint:errorlint // the very same error
				t.Errorf("%s, %s: %q, %v, %v", v.Name, what, got, known, err)
			}
		}
		for i := start; i < len(v.Stored); i++ {
			refuse("cut", v.EtcdKey, v.Stored[:i])
		}
		// within the marker and the name, which may be that of another key then
		for i := range start {
			if got, _, err := r.Open(v.EtcdKey, v.Stored[:i]); err == nil || got != nil {
				t.Errorf("%s, cut at %d: %q, %v", v.Name, i, got, err)
			}
		}
		for i := start; i < len(v.Stored); i++ {
			bad := bytes.Clone(v.Stored)
			bad[i] ^= 0x80
			refuse("altered", v.EtcdKey, bad)
		}
		if o, _ := parseObject(v.Plaintext); v.Type == AESGCM || o.name != "" {
			refuse("moved", append(bytes.Clone(v.EtcdKey), 'x'), v.Stored)
			refuse("moved to another namespace", []byte("/registry/secrets/another/s1"), v.Stored)
		}
		for range 20 {
			other := make([]byte, len(v.Secret))
			rand.Read(other)
			r = reader(t, v.Type, Key{v.KeyName, other})
			refuse("another key", v.EtcdKey, v.Stored)
		}
	}
}

// TestCBCWrongKey: with a wrong key one value in 256 has good padding, and none of them looks like
// an object.
func TestCBCWrongKey(t *testing.T) {
	block, err := aes.NewCipher(make([]byte, 32))
	if err != nil {
		t.Fatal(err)
	}
	open, padded := cbcOpener(block), 0
	for range 20_000 {
		payload := make([]byte, 80) // of some other key
		rand.Read(payload)
		out := make([]byte, 64)
		cipher.NewCBCDecrypter(block, payload[:16]).CryptBlocks(out, payload[16:])
		if _, ok := unpad(out); ok {
			padded++
		}
		if got, ok := open(nil, payload); ok {
			t.Fatalf("noise was opened: %q", got)
		}
	}
	if padded == 0 {
		t.Error("no padding was good by chance: this proves nothing")
	}
}

func TestUnpad(t *testing.T) {
	for n := range 256 {
		out := append(bytes.Repeat([]byte{0xaa}, 512-n), bytes.Repeat([]byte{byte(n)}, n)...)
		if n == 0 {
			out[511] = 0
		}
		size, ok := unpad(out)
		if want := n >= 1 && n <= 16; ok != want || ok && size != 512-n || size < 512-16 {
			t.Errorf("padding of %d: %d, %v", n, size, ok)
		}
		if n >= 2 && n <= 16 {
			out[512-n] ^= 1
			if _, ok := unpad(out); ok {
				t.Errorf("padding of %d, its first byte altered: taken", n)
			}
		}
	}
}

// TestKeys: names choose keys as in kube-apiserver, those with colons too, and of two keys of one
// name both are tried.
func TestKeys(t *testing.T) {
	for _, typ := range []Type{AESCBC, AESGCM, Secretbox} {
		var vs []vector
		for _, v := range vectors(t) {
			if v.Type == typ && len(v.Secret) == 32 {
				vs = append(vs, v)
			}
		}
		wrong := bytes.Repeat([]byte{9}, 32)
		r := reader(t, typ, Key{"key", wrong}, Key{"key1", wrong}, Key{"key1", vs[0].Secret}, Key{"key", vs[1].Secret}, Key{"key:1", vs[1].Secret})
		for _, v := range vs[:2] { // of key1 and key:1
			if got, _, err := r.Open(v.EtcdKey, v.Stored); err != nil || !bytes.Equal(got, v.Plaintext) {
				t.Errorf("%s: %q, %v", v.Name, got, err)
			}
		}
		_, known, err := reader(t, typ, Key{"key2", wrong}).Open(vs[0].EtcdKey, vs[0].Stored)
		if known || err == nil || !strings.Contains(err.Error(), `"key1"`) || !strings.Contains(err.Error(), "file") {
			t.Errorf("%s, a key that is not there: %v, %v", typ, known, err)
		}
		_, known, err = r.Open(nil, []byte(r.Marker()+strings.Repeat("n", 5000)+":x"))
		if known || err == nil || len(err.Error()) > 300 {
			t.Errorf("%s, a long name: %v, %v", typ, known, err)
		}
		for _, stored := range []string{r.Marker(), r.Marker() + "key", "", "k8s:enc:", "k8s:enc:kms:v2:key1:x"} {
			if _, known, err := r.Open(nil, []byte(stored)); !known || err == nil {
				t.Errorf("%q: %v, %v", stored, known, err)
			}
		}
	}
}

func TestNew(t *testing.T) {
	const canary = "canarycanarycanarycanarycanary!!"
	for what, c := range map[string]Config{
		"type":   {Type: "kms", Keys: []Key{{"k", []byte(canary)}}},
		"none":   {Type: AESCBC},
		"name":   {Type: AESGCM, Keys: []Key{{"", []byte(canary)}}},
		"size":   {Type: AESGCM, Keys: []Key{{"k", []byte(canary[1:])}}},
		"short":  {Type: Secretbox, Keys: []Key{{"k", []byte(canary[:16])}}},
		"second": {Type: Secretbox, Keys: []Key{{"k", []byte(canary)}, {"l", nil}}},
	} {
		if _, err := New(c); err == nil || strings.Contains(err.Error(), "canary") {
			t.Errorf("%s: %v", what, err)
		}
	}
	secret := []byte(canary)
	for _, v := range vectors(t) {
		if v.Type != AESGCM || len(v.Secret) != 32 {
			continue
		}
		copy(secret, v.Secret)
		r := reader(t, v.Type, Key{v.KeyName, secret})
		clear(secret)
		if _, _, err := r.Open(v.EtcdKey, v.Stored); err != nil {
			t.Errorf("the secret was retained: %v", err)
		}
	}
}

// FuzzOpen: no bytes make a reader panic, and what opens is no longer than what was stored.
func FuzzOpen(f *testing.F) {
	secret := bytes.Repeat([]byte{7}, 32)
	var readers []*Reader
	for _, typ := range []Type{AESCBC, AESGCM, Secretbox} {
		readers = append(readers, reader(f, typ, Key{"key1", secret}, Key{"a:b", secret}))
	}
	for _, v := range vectors(f) {
		f.Add(v.EtcdKey, v.Stored)
	}
	for _, r := range readers {
		f.Add([]byte("key"), []byte(r.Marker()+"key1:"+strings.Repeat("p", 32)))
		f.Add([]byte("key"), []byte(r.Marker()+"a:b:"+strings.Repeat("p", 41)))
	}
	f.Fuzz(func(t *testing.T, key, stored []byte) {
		was := bytes.Clone(stored)
		for _, r := range readers {
			got, known, err := r.Open(key, stored)
			if (err == nil) != (got != nil) || err == nil && (!known || len(got) > len(stored)) {
				t.Errorf("%q, %v, %v", got, known, err)
			}
		}
		if !bytes.Equal(was, stored) {
			t.Error("the stored bytes were changed")
		}
	})
}
