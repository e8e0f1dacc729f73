package envelope

import (
	"bytes"
	"encoding/json"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
)

// copyVector is one line of testdata/recovery.json: a recovery copy, its annotation, and a whole
// value that holds it.
type copyVector struct {
	Name       string
	Provider   string // that wrapped the copy
	Copy       Copy
	Annotation string
	Encoded    []byte
	Value      vector
}

func copyVectors() []copyVector {
	value := vectors()[0]
	return []copyVector{
		{Name: "bare", Provider: "dr", Copy: Copy{KeyID: "1", Source: fill(50, 60)}, Annotation: "dr.recovery.etcd-kms-proxy.io", Value: value},
		{
			Name: "annotations", Provider: "ack.eu-central-1", Annotation: "ack.eu-central-1.recovery.etcd-kms-proxy.io", Value: value,
			Copy: Copy{KeyID: "schlüssel/2", Source: fill(0, 1024), Annotations: map[string][]byte{"b.example.com": {0, 255}, "a.example.com": []byte("x")}},
		},
	}
}

// reference encodes a copy from the format's description, by none of this package's code.
func (v *copyVector) reference() []byte {
	field := func(b []byte, n protowire.Number, value []byte) []byte {
		return protowire.AppendBytes(protowire.AppendTag(b, n, protowire.BytesType), value)
	}
	b := field(nil, 2, []byte(v.Copy.KeyID))
	b = field(b, 3, v.Copy.Source)
	for _, k := range []string{"a.example.com", "b.example.com"} {
		if value, ok := v.Copy.Annotations[k]; ok {
			b = field(b, 4, field(field(nil, 1, []byte(k)), 2, value))
		}
	}
	return b
}

func goldenCopies(t testing.TB) []copyVector {
	t.Helper()
	path := filepath.Join("testdata", "recovery.json")
	if *update {
		vs := copyVectors()
		for i := range vs {
			v := &vs[i]
			v.Encoded = v.reference()
			v.Value.AnnotKeys, v.Value.AnnotValues = []string{v.Annotation}, [][]byte{v.Encoded}
			v.Value.Stored = v.Value.reference(t)
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
	var vs []copyVector
	if err := json.Unmarshal(b, &vs); err != nil {
		t.Fatal(err)
	}
	return vs
}

func TestGoldenCopies(t *testing.T) {
	for _, v := range goldenCopies(t) {
		t.Run(v.Name, func(t *testing.T) {
			if diff := cmp.Diff(v.reference(), v.Encoded); diff != "" {
				t.Fatalf("the golden bytes are not what the description gives:\n%s", diff)
			}
			c, err := ParseCopy(v.Encoded)
			if diff := cmp.Diff(v.Copy, c); err != nil || diff != "" {
				t.Errorf("ParseCopy: %v\n%s", err, diff)
			}
			b, err := v.Copy.Append([]byte("before"))
			if err != nil || !bytes.Equal(b, append([]byte("before"), v.Encoded...)) {
				t.Errorf("Append = %q, %v", b, err)
			}
			if name, err := RecoveryAnnotation(v.Provider); err != nil || name != v.Annotation {
				t.Errorf("RecoveryAnnotation = %q, %v", name, err)
			}
			if name, ok := RecoveryProvider(v.Annotation); !ok || name != v.Provider {
				t.Errorf("RecoveryProvider = %q, %v", name, ok)
			}
			_, object, _ := Split(v.Value.Stored)
			o, err := Parse(object)
			if err != nil {
				t.Fatal(err)
			}
			if !o.HasCopies() || len(o.KMSAnnotations()) != 0 || !bytes.Equal(o.Annotations[v.Annotation], v.Encoded) {
				t.Errorf("the value's header is %+v", o.Header)
			}
			seed, err := NewSeed(TypeSeed, v.Value.Secret)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := seed.Open(nil, v.Value.EtcdKey, o.Data); err != nil || !bytes.Equal(got, v.Value.Plaintext) {
				t.Errorf("Open = %q, %v", got, err)
			}
		})
	}
}

// TestEveryByteOfACopyCorruptedAndEveryTruncation: nothing panics, and what is still a copy is
// another one, which the KMS then refuses.
func TestEveryByteOfACopyCorruptedAndEveryTruncation(t *testing.T) {
	for _, v := range goldenCopies(t) {
		differs := func(b []byte, what string, at int) {
			t.Helper()
			c, err := ParseCopy(b)
			switch {
			case err != nil && !errors.Is(err, ErrMalformed):
				t.Fatalf("%s: %s %d: %v", v.Name, what, at, err)
			case err == nil && c.KeyID == v.Copy.KeyID && bytes.Equal(c.Source, v.Copy.Source) && maps.EqualFunc(c.Annotations, v.Copy.Annotations, bytes.Equal):
				t.Fatalf("%s: %s %d changes nothing", v.Name, what, at)
			}
		}
		for i := range v.Encoded {
			for bit := range 8 {
				v.Encoded[i] ^= 1 << bit
				differs(v.Encoded, "byte", i)
				v.Encoded[i] ^= 1 << bit
			}
		}
		for n := range v.Encoded {
			differs(v.Encoded[:n], "length", n)
		}
	}
}

func TestCopyLimits(t *testing.T) {
	good := Copy{KeyID: "1", Source: []byte{1}}
	for name, change := range map[string]func(*Copy){
		"no key ID":       func(c *Copy) { c.KeyID = "" },
		"long key ID":     func(c *Copy) { c.KeyID = strings.Repeat("k", MaxKeyID+1) },
		"not UTF-8":       func(c *Copy) { c.KeyID = "\xff" },
		"no source":       func(c *Copy) { c.Source = nil },
		"long source":     func(c *Copy) { c.Source = make([]byte, MaxSource+1) },
		"annotation":      func(c *Copy) { c.Annotations = map[string][]byte{"nodot": nil} },
		"long annotation": func(c *Copy) { c.Annotations = map[string][]byte{"a.b": make([]byte, MaxAnnotations)} },
		"a copy in it":    func(c *Copy) { c.Annotations = map[string][]byte{"x.recovery.etcd-kms-proxy.io": nil} },
	} {
		c := good
		change(&c)
		if b, err := c.Append([]byte("b")); !errors.Is(err, ErrMalformed) || string(b) != "b" {
			t.Errorf("%s: Append = %q, %v", name, b, err)
		}
		h := c.Header(TypeKey)
		if _, err := ParseCopy(h.appendHeader(nil)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: ParseCopy: %v", name, err)
		}
	}
	encoded, err := good.Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	for name, extra := range map[string][]byte{"data": {0x0a, 1, 7}, "empty data": {0x0a, 0}, "a type": {0x28, 1}} {
		if _, err := ParseCopy(append(bytes.Clone(encoded), extra...)); !errors.Is(err, ErrMalformed) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if c, err := ParseCopy(append(bytes.Clone(encoded), 0x7a, 1, 7)); err != nil || !cmp.Equal(c, good) {
		t.Errorf("an unknown field: %+v, %v", c, err)
	}
}

func TestRecoveryAnnotationNames(t *testing.T) {
	for _, bad := range []string{"", "Dr", "d_r", "a..b", ".a", "a.", "-a", "a-", "a.-b", strings.Repeat("a", 64), "a:b", "ü"} {
		if name, err := RecoveryAnnotation(bad); !errors.Is(err, ErrMalformed) {
			t.Errorf("%q becomes %q, %v", bad, name, err)
		}
	}
	for _, other := range []string{"a.example.com", "recovery.etcd-kms-proxy.io", ".recovery.etcd-kms-proxy.io", "a.recovery.etcd-kms-proxy.io.", ""} {
		if p, ok := RecoveryProvider(other); ok {
			t.Errorf("%q is taken for a copy of %q", other, p)
		}
	}
}

func TestOwn(t *testing.T) {
	h := Header{Annotations: map[string][]byte{"a.b": {1}, "dr.recovery.etcd-kms-proxy.io": {2}}}
	if diff := cmp.Diff(map[string][]byte{"a.b": {1}}, h.KMSAnnotations()); diff != "" || !h.HasCopies() {
		t.Error(diff)
	}
	h = Header{Annotations: map[string][]byte{"a.b": {1}}}
	if diff := cmp.Diff(h.Annotations, h.KMSAnnotations()); diff != "" || h.HasCopies() {
		t.Error(diff)
	}
}

// FuzzParseCopy: nothing panics, what is accepted is within the limits, and the canonical encoding
// means the same and is stable.
func FuzzParseCopy(f *testing.F) {
	for _, v := range copyVectors() {
		f.Add(v.reference())
	}
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		c, err := ParseCopy(b)
		if !bytes.Equal(before, b) {
			t.Fatal("the input was changed")
		}
		if err != nil {
			return
		}
		one, err := c.Append(nil)
		if err != nil {
			t.Fatalf("accepted and then refused: %v", err)
		}
		again, err := ParseCopy(one)
		if err != nil {
			t.Fatal(err)
		}
		two, err := again.Append(nil)
		if err != nil || !bytes.Equal(one, two) {
			t.Fatalf("the encoding is not stable: %v", err)
		}
	})
}

// TestOfflineCopy checks that a copy for offline keys is stored unchanged next to the ID of its
// recipients, that neither is an annotation of the KMS of the value, and that no copy of one kind
// is taken for one of the other.
func TestOfflineCopy(t *testing.T) {
	file := append([]byte("age-encryption.org/v1\n-> X25519 "), fill(0, 300)...)
	h := Header{Type: TypeSeed, KeyID: "1", Source: []byte("wrapped"), Annotations: map[string][]byte{"a.b": {1}}}
	h.SetOfflineCopy("off.line", OfflineCopy{Recipients: "age-1", File: file})
	want := map[string][]byte{"a.b": {1}, "off.line.recovery.etcd-kms-proxy.io": file, "off.line.recovery-id.etcd-kms-proxy.io": []byte("age-1")}
	if diff := cmp.Diff(want, h.Annotations); diff != "" {
		t.Error(diff)
	}
	if err := h.Validate(); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(map[string][]byte{"a.b": {1}}, h.KMSAnnotations()); diff != "" || !h.HasCopies() {
		t.Error(diff)
	}
	c, ok := h.OfflineCopyBy("off.line")
	if !ok || c.Recipients != "age-1" || !bytes.Equal(c.File, file) {
		t.Errorf("%+v, %v", c, ok)
	}
	if _, err := ParseCopy(file); !errors.Is(err, ErrMalformed) {
		t.Errorf("an age file is taken for a copy by a KMS: %v", err)
	}
	for _, v := range goldenCopies(t) {
		h.Annotations["dr.recovery.etcd-kms-proxy.io"] = v.Encoded
		if _, ok := h.OfflineCopyBy("dr"); ok {
			t.Errorf("%s is taken for an age file", v.Name)
		}
	}
	for _, bad := range [][]byte{nil, []byte("\xff"), bytes.Repeat([]byte("a"), MaxKeyID+1)} {
		h.Annotations["off.line.recovery-id.etcd-kms-proxy.io"] = bad
		if c, ok := h.OfflineCopyBy("off.line"); !ok || c.Recipients != "" {
			t.Errorf("recipients %q, %v", c.Recipients, ok)
		}
	}
	nested := Copy{KeyID: "1", Source: []byte("s"), Annotations: h.Annotations}
	if err := nested.Validate(); !errors.Is(err, ErrMalformed) {
		t.Errorf("a copy within a copy: %v", err)
	}
	if p, ok := RecoveryProvider("off.line.recovery-id.etcd-kms-proxy.io"); ok {
		t.Errorf("the ID of recipients is taken for a copy by %q", p)
	}
}
