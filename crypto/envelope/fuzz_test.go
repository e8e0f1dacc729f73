package envelope

import (
	"bytes"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
)

// FuzzParse: nothing panics, what is accepted is within the limits, and the canonical encoding
// means the same and is stable.
func FuzzParse(f *testing.F) {
	for _, v := range vectors() {
		_, object, _ := Split(v.reference(f))
		f.Add(object)
		f.Add(object[:len(object)/2])
	}
	f.Add(protowire.AppendTag(nil, 1, protowire.StartGroupType))
	f.Fuzz(func(t *testing.T, b []byte) {
		before := bytes.Clone(b)
		data, rest, cut := Cut(b)
		o, err := Parse(b)
		if !bytes.Equal(before, b) {
			t.Fatal("the input was changed")
		}
		if err != nil {
			return
		}
		if cut && &data[0] == &o.Data[0] && !bytes.HasSuffix(b, rest) {
			t.Fatal("Cut's rest is not the end of the object")
		}
		one, err := o.Append(nil)
		if err != nil {
			t.Fatalf("accepted and then refused: %v", err)
		}
		again, err := Parse(one)
		if err != nil {
			t.Fatal(err)
		}
		// An absent and an empty annotation value are the same to protobuf.
		for k, v := range o.Annotations {
			if v == nil {
				o.Annotations[k] = []byte{}
			}
		}
		if diff := cmp.Diff(o, again); diff != "" {
			t.Fatal(diff)
		}
		two, err := again.Append(nil)
		if err != nil || !bytes.Equal(one, two) {
			t.Fatalf("the encoding is not stable: %v", err)
		}
	})
}

// FuzzOpen: a seed never opens, and never panics on, data that it did not seal.
func FuzzOpen(f *testing.F) {
	seed, err := NewSeed(TypeSeed, fill(1, 32))
	if err != nil {
		f.Fatal(err)
	}
	key, err := NewSeed(TypeKey, fill(1, 32))
	if err != nil {
		f.Fatal(err)
	}
	f.Add([]byte("k"), []byte("v"))
	f.Fuzz(func(t *testing.T, etcdKey, b []byte) {
		sealed, err := seed.seal(nil, etcdKey, b)
		if err != nil {
			t.Fatal(err)
		}
		if got, err := seed.Open(nil, etcdKey, sealed); err != nil || !bytes.Equal(got, b) {
			t.Fatalf("Open = %q, %v", got, err)
		}
		for _, s := range []*Seed{seed, key} {
			if _, err := s.Open(nil, etcdKey, b); err == nil {
				t.Fatal("opened what was not sealed")
			}
		}
	})
}
