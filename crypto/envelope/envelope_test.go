package envelope

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	"google.golang.org/protobuf/encoding/protowire"
)

func newFrame(t testing.TB, v *vector) (*Frame, *Seed) {
	t.Helper()
	seed, err := NewSeed(TypeSeed, v.Secret)
	if err != nil {
		t.Fatal(err)
	}
	f, err := NewFrame(v.Provider, v.header(), seed)
	if err != nil {
		t.Fatal(err)
	}
	return f, seed
}

// openStored is the whole way back; the tests below corrupt its input.
func openStored(stored []byte, provider, etcdKey string, seeds map[Type]*Seed) ([]byte, error) {
	p, object, ok := Split(stored)
	if !ok || string(p) != provider {
		return nil, errors.New("no value of the provider")
	}
	o, err := Parse(object)
	if err != nil {
		return nil, err
	}
	return seeds[o.Type].Open(nil, []byte(etcdKey), o.Data)
}

func TestFrameSealsWhatTheDescriptionSays(t *testing.T) {
	for _, v := range vectors() {
		if v.Type != TypeSeed {
			continue
		}
		f, _ := newFrame(t, &v)
		for n := range 300 {
			plaintext := fill(byte(n), n)
			stored, err := f.Seal(nil, v.EtcdKey, plaintext)
			if err != nil {
				t.Fatal(err)
			}
			if len(stored) != f.Size(n) || cap(stored) != len(stored) {
				t.Fatalf("%s: sealed %d bytes into len %d, cap %d; Size says %d", v.Name, n, len(stored), cap(stored), f.Size(n))
			}
			_, object, _ := Split(stored)
			data, rest, ok := Cut(object)
			if !ok || !bytes.Equal(rest, f.Rest()) {
				t.Fatalf("%s: Cut = %v, %q; the frame's rest is %q", v.Name, ok, rest, f.Rest())
			}
			// The same randomness through the reference gives the same bytes.
			want := v
			want.Info, want.Nonce, want.Plaintext = data[:32], data[32:44], plaintext
			if diff := cmp.Diff(want.reference(t), stored); diff != "" {
				t.Fatalf("%s, %d bytes:\n%s", v.Name, n, diff)
			}
		}
	}
}

func TestSealedTwiceDiffers(t *testing.T) {
	v := vectors()[0]
	f, _ := newFrame(t, &v)
	seen := map[string]bool{}
	for range 1000 {
		stored, err := f.Seal(nil, []byte("k"), nil)
		if err != nil {
			t.Fatal(err)
		}
		_, object, _ := Split(stored)
		data, _, _ := Cut(object)
		for _, random := range [][]byte{data[:32], data[32:44]} {
			if seen[string(random)] {
				t.Fatal("an info or a nonce came twice")
			}
			seen[string(random)] = true
		}
	}
}

func TestEveryByteCorruptedAndEveryTruncation(t *testing.T) {
	for _, v := range golden(t) {
		seeds := map[Type]*Seed{}
		seeds[v.Type], _ = NewSeed(v.Type, v.Secret)
		// A value whose type was changed is tried with the seed that type would make of the same
		// secret.
		for _, typ := range []Type{TypeKey, TypeSeed} {
			if s, err := NewSeed(typ, v.Secret); err == nil {
				seeds[typ] = s
			} else if seeds[typ] == nil {
				seeds[typ] = &Seed{typ: TypeKey, aead: mustAEAD(t, fill(77, 32))}
			}
		}
		_, object, _ := Split(v.Stored)
		data, _, _ := Cut(object)
		dataAt := len(v.Stored) - len(object) + bytes.Index(object, data)
		for i := range v.Stored {
			for bit := range 8 {
				b := bytes.Clone(v.Stored)
				b[i] ^= 1 << bit
				got, err := openStored(b, v.Provider, string(v.EtcdKey), seeds)
				if err != nil {
					if i >= dataAt && i < dataAt+len(data) && !errors.Is(err, ErrOpen) {
						t.Fatalf("%s: byte %d of the data: %v, want ErrOpen", v.Name, i, err)
					}
					continue
				}
				// What opens must have an untouched provider, data and etcd key. Header bytes are
				// the KMS' to check: they decide which secret comes back.
				if i < dataAt+len(data) || !bytes.Equal(got, v.Plaintext) {
					t.Fatalf("%s: byte %d, bit %d changed, and it opens as %q", v.Name, i, bit, got)
				}
			}
		}
		for n := range len(v.Stored) {
			_, err := openStored(v.Stored[:n], v.Provider, string(v.EtcdKey), seeds)
			// A seed's type is the last field, and 0 when cut off: it then fails to open as a key.
			if err == nil && !endsInOptional(v, n) {
				t.Fatalf("%s: opens when cut to %d of %d bytes", v.Name, n, len(v.Stored))
			}
		}
		for n := range len(data) {
			if _, err := seeds[v.Type].Open(nil, v.EtcdKey, data[:n]); !errors.Is(err, ErrOpen) {
				t.Fatalf("%s: data cut to %d bytes: %v", v.Name, n, err)
			}
		}
		for _, key := range []string{"", string(v.EtcdKey) + "x", string(v.EtcdKey[1:]) + "y", "/registry/secrets/default/s2"} {
			if _, err := seeds[v.Type].Open(nil, []byte(key), data); !errors.Is(err, ErrOpen) {
				t.Fatalf("%s: opens under etcd key %q: %v", v.Name, key, err)
			}
		}
	}
}

// endsInOptional reports whether a key value cut to n bytes has lost annotations only: it says the
// same to the cipher, and something else to the KMS, which is the one to refuse it.
func endsInOptional(v vector, n int) bool {
	if v.Type != TypeKey || len(v.AnnotKeys) == 0 {
		return false
	}
	o := Object{Header: v.header(), Data: make([]byte, nonceSize+len(v.Plaintext)+tagSize)}
	o.Annotations = nil
	bare, err := o.Append([]byte(scheme + v.Provider + ":"))
	return err == nil && n == len(bare)
}

func TestTypesDoNotOpenEachOther(t *testing.T) {
	secret := fill(1, 32)
	key, _ := NewSeed(TypeKey, secret)
	seed, _ := NewSeed(TypeSeed, secret)
	sealed, err := seed.seal(nil, []byte("k"), []byte("v"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := key.Open(nil, []byte("k"), sealed); !errors.Is(err, ErrOpen) {
		t.Errorf("a key opens a seed's value: %v", err)
	}
	if _, err := key.Open(nil, []byte("k"), sealed[infoSize:]); !errors.Is(err, ErrOpen) {
		t.Errorf("a key opens a seed's value: %v", err)
	}
}

func TestSeedSizes(t *testing.T) {
	for n := range 70 {
		_, err := NewSeed(TypeKey, make([]byte, n))
		if want := n == 16 || n == 24 || n == 32; (err == nil) != want {
			t.Errorf("a key of %d bytes: %v", n, err)
		}
		_, err = NewSeed(TypeSeed, make([]byte, n))
		if want := n >= 32; (err == nil) != want {
			t.Errorf("a seed of %d bytes: %v", n, err)
		}
	}
	if _, err := NewSeed(2, make([]byte, 32)); !errors.Is(err, ErrMalformed) {
		t.Errorf("type 2: %v", err)
	}
}

func TestSeedDoesNotRetainSecret(t *testing.T) {
	for _, typ := range []Type{TypeKey, TypeSeed} {
		secret := fill(1, 32)
		s, _ := NewSeed(typ, secret)
		clear(secret)
		v := vectors()[0]
		if typ == TypeKey {
			v = vectors()[4]
		}
		_, object, _ := Split(v.reference(t))
		data, _, _ := Cut(object)
		if _, err := s.Open(nil, v.EtcdKey, data); err != nil {
			t.Errorf("type %d: %v", typ, err)
		}
	}
}

func TestFrameRefuses(t *testing.T) {
	v := vectors()[0]
	seed, _ := NewSeed(TypeSeed, v.Secret)
	key, _ := NewSeed(TypeKey, v.Secret)
	ok := v.header()
	readOnly := ok
	readOnly.Type = TypeKey
	noID := ok
	noID.KeyID = ""
	for name, try := range map[string]struct {
		provider string
		h        Header
		seed     *Seed
	}{
		"no provider": {"", ok, seed}, "colon": {"a:b", ok, seed}, "key type": {"p", readOnly, key},
		"key behind a seed's header": {"p", ok, key}, "no key ID": {"p", noID, seed},
	} {
		if _, err := NewFrame(try.provider, try.h, try.seed); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestConcurrentUse(t *testing.T) {
	v := vectors()[0]
	f, seed := newFrame(t, &v)
	var wg sync.WaitGroup
	for g := range 8 {
		wg.Go(func() {
			for i := range 200 {
				plaintext := fill(byte(g), i)
				key := fmt.Appendf(nil, "/k/%d/%d", g, i)
				stored, err := f.Seal(nil, key, plaintext)
				if err != nil {
					t.Error(err)
					return
				}
				_, object, _ := Split(stored)
				data, _, _ := Cut(object)
				if got, err := seed.Open(nil, key, data); err != nil || !bytes.Equal(got, plaintext) {
					t.Errorf("Open = %q, %v", got, err)
					return
				}
			}
		})
	}
	wg.Wait()
}

func TestSeedNeverPrints(t *testing.T) {
	secret := []byte("canary-canary-canary-canary-1234")
	for _, typ := range []Type{TypeKey, TypeSeed} {
		s, err := NewSeed(typ, secret)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = s.derive(make([]byte, infoSize))
		var out strings.Builder
		for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%X", "%d", "%p", "%T"} {
			fmt.Fprintf(&out, verb+"\n", s)
			fmt.Fprintf(&out, verb+"\n", struct{ S *Seed }{s})
			fmt.Fprintf(&out, verb+"\n", []*Seed{s})
		}
		for _, h := range []slog.Handler{slog.NewTextHandler(&out, nil), slog.NewJSONHandler(&out, nil)} {
			r := slog.Record{}
			r.Add("seed", s, "group", slog.GroupValue(slog.Any("s", s)), "in", struct{ S *Seed }{s})
			_ = h.Handle(context.Background(), r)
		}
		b, err := json.Marshal(map[string]any{"s": s})
		if err != nil {
			t.Fatal(err)
		}
		out.Write(b)
		for _, form := range []string{"canary", fmt.Sprintf("%x", "canary"), fmt.Sprintf("%X", "canary"), "Y2FuYXJ5", "99 97 110"} {
			if strings.Contains(out.String(), form) {
				t.Errorf("type %d: the output holds the seed as %q:\n%s", typ, form, out.String())
			}
		}
	}
}

func mustAEAD(t *testing.T, key []byte) interface {
	NonceSize() int
	Overhead() int
	Seal(dst, nonce, plaintext, additionalData []byte) []byte
	Open(dst, nonce, ciphertext, additionalData []byte) ([]byte, error)
} {
	t.Helper()
	a, err := newAEAD(key)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestParseLimits(t *testing.T) {
	ok := Object{Header: Header{Type: TypeSeed, KeyID: "k", Source: []byte("s")}, Data: []byte("d")}
	encode := func(o Object) []byte { // without checks
		b := protowire.AppendBytes(protowire.AppendTag(nil, fieldData, protowire.BytesType), o.Data)
		return o.appendHeader(b)
	}
	with := func(change func(*Object)) Object {
		o := ok
		change(&o)
		return o
	}
	annotated := func(k string, n int) func(*Object) {
		return func(o *Object) { o.Annotations = map[string][]byte{k: make([]byte, n)} }
	}
	label := strings.Repeat("a", 63)
	for name, c := range map[string]struct {
		o    Object
		good bool
	}{
		"plain":                {ok, true},
		"no data":              {with(func(o *Object) { o.Data = nil }), false},
		"no key ID":            {with(func(o *Object) { o.KeyID = "" }), false},
		"key ID 1024":          {with(func(o *Object) { o.KeyID = strings.Repeat("k", 1024) }), true},
		"key ID 1025":          {with(func(o *Object) { o.KeyID = strings.Repeat("k", 1025) }), false},
		"key ID not UTF-8":     {with(func(o *Object) { o.KeyID = "a\xff" }), false},
		"no source":            {with(func(o *Object) { o.Source = nil }), false},
		"source 1024":          {with(func(o *Object) { o.Source = make([]byte, 1024) }), true},
		"source 1025":          {with(func(o *Object) { o.Source = make([]byte, 1025) }), false},
		"type 2":               {with(func(o *Object) { o.Type = 2 }), false},
		"type -1":              {with(func(o *Object) { o.Type = -1 }), false},
		"annotation":           {with(annotated("a.b", 0)), true},
		"annotations 32768":    {with(annotated("a.b", 32765)), true},
		"annotations 32769":    {with(annotated("a.b", 32766)), false},
		"annotation one label": {with(annotated("ab", 1)), false},
		"annotation empty":     {with(annotated("", 1)), false},
		"annotation dot":       {with(annotated(".", 1)), false},
		"annotation last dot":  {with(annotated("a.b.", 1)), true},
		"annotation two dots":  {with(annotated("a..b", 1)), false},
		"annotation end dots":  {with(annotated("a.b..", 1)), false},
		"annotation upper":     {with(annotated("A.b", 1)), false},
		"annotation dash":      {with(annotated("a-b.c-d", 1)), true},
		"annotation dash ends": {with(annotated("a.b-", 1)), false},
		"annotation dash head": {with(annotated("-a.b", 1)), false},
		"annotation wild":      {with(annotated("*.b", 1)), false},
		"annotation not UTF-8": {with(annotated("a\xff.b", 1)), false},
		"annotation label 63":  {with(annotated(label+".b", 1)), true},
		"annotation label 64":  {with(annotated(label+"a.b", 1)), false},
		"annotation name 253":  {with(annotated(label+"."+label+"."+label+"."+label[:61], 1)), true},
		"annotation name 254":  {with(annotated(label+"."+label+"."+label+"."+label[:62], 1)), false},
	} {
		_, err := Parse(encode(c.o))
		_, aerr := c.o.Append(nil)
		if (err == nil) != c.good || (aerr == nil) != c.good {
			t.Errorf("%s: Parse %v, Append %v", name, err, aerr)
		}
		if !c.good && (!errors.Is(err, ErrMalformed) || !errors.Is(aerr, ErrMalformed)) {
			t.Errorf("%s: Parse %v, Append %v: not ErrMalformed", name, err, aerr)
		}
	}
}

func TestParseIsProtobufs(t *testing.T) {
	base, err := (&Object{Header: Header{Type: TypeSeed, KeyID: "k", Source: []byte("s")}, Data: []byte("d")}).Append(nil)
	if err != nil {
		t.Fatal(err)
	}
	bytesField := func(b []byte, n protowire.Number, v string) []byte {
		return protowire.AppendString(protowire.AppendTag(b, n, protowire.BytesType), v)
	}
	varint := func(b []byte, n protowire.Number, v uint64) []byte {
		return protowire.AppendVarint(protowire.AppendTag(b, n, protowire.VarintType), v)
	}
	group := func(b []byte, n protowire.Number, in []byte) []byte {
		return protowire.AppendTag(append(protowire.AppendTag(b, n, protowire.StartGroupType), in...), n, protowire.EndGroupType)
	}
	clone := func() []byte { return bytes.Clone(base) }
	want, _ := Parse(base)
	for name, c := range map[string]struct {
		in     []byte
		change func(*Object) // nil: it does not parse
	}{
		"unknown fields":       {group(varint(bytesField(clone(), 99, "x"), 100, 1<<63), 7, varint(nil, 1, 1)), func(*Object) {}},
		"data twice":           {bytesField(clone(), 1, "e"), func(o *Object) { o.Data = []byte("e") }},
		"key ID twice":         {bytesField(clone(), 2, "l"), func(o *Object) { o.KeyID = "l" }},
		"source twice":         {bytesField(clone(), 3, "t"), func(o *Object) { o.Source = []byte("t") }},
		"type twice":           {varint(clone(), 5, 0), func(o *Object) { o.Type = TypeKey }},
		"enum of 64 bits":      {varint(clone(), 5, 1<<32), func(o *Object) { o.Type = TypeKey }},
		"known as varint":      {varint(clone(), 2, 3), func(*Object) {}},
		"type as bytes":        {bytesField(clone(), 5, "\x00"), func(*Object) {}},
		"annotation twice":     {bytesField(bytesField(clone(), 4, "\n\x03a.b\x12\x01x"), 4, "\n\x03a.b\x12\x01y"), func(o *Object) { o.Annotations = map[string][]byte{"a.b": []byte("y")} }},
		"annotation backwards": {bytesField(clone(), 4, "\x12\x01x\n\x03a.b"), func(o *Object) { o.Annotations = map[string][]byte{"a.b": []byte("x")} }},
		"annotation valueless": {bytesField(clone(), 4, "\n\x03a.b\x18\x01"), func(o *Object) { o.Annotations = map[string][]byte{"a.b": nil} }},
		"annotation keyless":   {bytesField(clone(), 4, "\x12\x01x"), nil},
		"annotation cut":       {bytesField(clone(), 4, "\n\x04a.b"), nil},
		"emptied data":         {bytesField(clone(), 1, ""), nil},
		"bad UTF-8 overruled":  {bytesField(bytesField(nil, 2, "\xff"), 2, "k"), nil},
		"field 0":              {append(clone(), 0x02, 0x00), nil},
		"end of no group":      {append(clone(), 0x0c), nil},
		"open group":           {append(clone(), 0x0b), nil},
		"endless varint":       {append(clone(), bytes.Repeat([]byte{0xff}, 11)...), nil},
		"length over the end":  {append(clone(), 0x12, 0xff, 0xff, 0xff, 0xff, 0x0f), nil},
		"nothing":              {nil, nil},
		"group bomb":           {append(clone(), bytes.Repeat([]byte{0x3b}, 1<<20)...), nil},
	} {
		got, err := Parse(c.in)
		if c.change == nil {
			if !errors.Is(err, ErrMalformed) {
				t.Errorf("%s: %v, want ErrMalformed", name, err)
			}
			continue
		}
		o := want
		c.change(&o)
		if diff := cmp.Diff(o, got); err != nil || diff != "" {
			t.Errorf("%s: %v\n%s", name, err, diff)
		}
	}
}

func TestCut(t *testing.T) {
	for in, want := range map[string]bool{
		"": false, "\n": false, "\n\x00": false, "\n\x02a": false, "\n\x01a": true, "\n\x01arest": true, "\x12\x01a": false, "\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01a": false,
	} {
		data, rest, ok := Cut([]byte(in))
		if ok != want || ok && (string(data) != "a" || string(rest) != in[3:]) {
			t.Errorf("Cut(%q) = %q, %q, %v", in, data, rest, ok)
		}
	}
}

func TestSplit(t *testing.T) {
	for in, want := range map[string]string{
		"": "", "k8s:enc:kms:v2:": "", "k8s:enc:kms:v2:p": "", "k8s:enc:kms:v2::x": "", "k8s:enc:kms:v2:p:": "p|", "k8s:enc:kms:v2:p:o:o": "p|o:o",
		"k8s:enc:kms:v1:p:x": "", "k8s:enc:aescbc:v1:p:x": "", " k8s:enc:kms:v2:p:o": "",
	} {
		p, o, ok := Split([]byte(in))
		got := ""
		if ok {
			got = string(p) + "|" + string(o)
		}
		if got != want {
			t.Errorf("Split(%q) = %q, want %q", in, got, want)
		}
	}
}
