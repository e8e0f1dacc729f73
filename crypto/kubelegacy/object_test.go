package kubelegacy

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"strings"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
)

// message makes a protobuf message of fields with bytes, in the order given.
func message(parts ...any) []byte {
	var b []byte
	for i := 0; i < len(parts); i += 2 {
		b = protowire.AppendTag(b, protowire.Number(parts[i].(int)), protowire.BytesType)
		switch v := parts[i+1].(type) {
		case string:
			b = protowire.AppendString(b, v)
		case []byte:
			b = protowire.AppendBytes(b, v)
		}
	}
	return b
}

// stored is an object in protobuf.
func stored(raw []byte) []byte {
	return append([]byte(protobufMark), message(1, message(1, "v1", 2, "Secret"), 2, raw, 3, "", 4, "")...)
}

func TestParseObject(t *testing.T) {
	meta := message(1, "s1", 2, "", 3, "ns", 4, "", 5, "uid", 6, "")
	good := stored(message(1, meta, 2, message(1, "k", 2, "v"), 3, "Opaque"))
	const cborMeta = "\x48metadata\xa2\x44name\x41w\x49namespace\x42ns"
	const cborType = "\x44kind\x46Widget"
	cbor := "\xd9\xd9\xf7\xa3" + cborType + cborMeta + "\x4aapiVersion\x42v1"
	for name, test := range map[string]struct {
		data string
		want string // "namespace/name", or "" if it is no object
	}{
		"protobuf":                         {string(good), "ns/s1"},
		"without a namespace":              {string(stored(message(1, message(1, "n", 3, "")))), "/n"},
		"without a name":                   {string(stored(message(1, ""))), "/"},
		"with fields of later Kubernetes":  {string(stored(message(1, message(1, "n", 99, "x"), 77, "y"))), "/n"},
		"the mark":                         {protobufMark, ""},
		"the mark and noise":               {protobufMark + "\xff\x00", ""},
		"what the mark used to do for":     {protobufMark + "\n\x0c\n\x02v1\x12\x06Secret\x12\x05bytes", ""},
		"another mark":                     {"k8s\x01" + string(good[4:]), ""},
		"without the end":                  {string(good[:len(good)-4]), ""},
		"with one of the last two":         {string(good[:len(good)-2]), ""},
		"with more behind":                 {string(good) + "\x00", ""},
		"with a field behind":              {string(good) + "\x2a\x00", ""},
		"with a content type":              {protobufMark + string(message(1, message(1, "v1", 2, "Secret"), 2, message(1, meta), 3, "", 4, "x")), ""},
		"out of order":                     {protobufMark + string(message(2, message(1, meta), 1, message(1, "v1", 2, "Secret"), 3, "", 4, "")), ""},
		"a field twice":                    {protobufMark + string(message(1, message(1, "v1", 2, "Secret"), 2, message(1, meta), 2, message(1, meta), 3, "", 4, "")), ""},
		"without a kind":                   {protobufMark + string(message(1, message(1, "v1", 2, ""), 2, message(1, meta), 3, "", 4, "")), ""},
		"a kind of noise":                  {protobufMark + string(message(1, message(1, "v1", 2, "Sec\xffret"), 2, message(1, meta), 3, "", 4, "")), ""},
		"an empty object":                  {string(stored(nil)), ""},
		"without metadata":                 {string(stored(message(2, "x"))), ""},
		"metadata twice":                   {string(stored(message(1, meta, 1, meta))), ""},
		"metadata of noise":                {string(stored(message(1, "\xff\xff\xff"))), ""},
		"a name of noise":                  {string(stored(message(1, message(1, "s\xff")))), ""},
		"a name twice":                     {string(stored(message(1, message(1, "a", 1, "b")))), ""},
		"a length in more bytes than need": {protobufMark + "\x0a\x8c\x00" + string(good[6:]), ""},
		"a group":                          {string(stored(append(message(1, meta), 0x13, 0x14))), ""},

		"JSON":                      {`{"apiVersion":"apps/v1","kind":"Widget","metadata":{"name":"w","namespace":"ns"},"x":"ü"}` + "\n", "ns/w"},
		"JSON without a line feed":  {`{"kind":"Widget","apiVersion":"v1","metadata":{}}`, "/"},
		"JSON and two line feeds":   {`{"kind":"Widget","apiVersion":"v1","metadata":{}}` + "\n\n", ""},
		"JSON and a tab":            {`{"kind":"Widget","apiVersion":"v1","metadata":{}}` + "\t", ""},
		"JSON without metadata":     {`{"kind":"Widget","apiVersion":"v1"}`, ""},
		"JSON without a kind":       {`{"apiVersion":"v1","metadata":{}}`, ""},
		"JSON with a number":        {`{"kind":"Widget","apiVersion":"v1","metadata":{"name":1}}`, ""},
		"JSON with a name twice":    {`{"kind":"Widget","kind":"Widget","apiVersion":"v1","metadata":{}}`, ""},
		"JSON that is not UTF-8":    {`{"kind":"Widget","apiVersion":"v1","metadata":{},"x":"` + "\xff" + `"}`, ""},
		"JSON and more":             {`{"kind":"Widget","apiVersion":"v1","metadata":{}}{}`, ""},
		"JSON that is cut":          {`{"kind":"Widget","apiVersion":"v1","metadata":{}`, ""},
		"a list":                    {`[]`, ""},
		"YAML":                      {"kind: Widget\napiVersion: v1\nmetadata: {}\n", ""},
		"text":                      {"0123456789abcdef", ""},
		"nothing":                   {"", ""},
		"CBOR":                      {cbor, "ns/w"},
		"the mark of CBOR":          {cborMark, ""},
		"CBOR and more":             {cbor + "\x00", ""},
		"CBOR out of order":         {"\xd9\xd9\xf7\xa3" + cborMeta + cborType + "\x4aapiVersion\x42v1", ""},
		"CBOR of no known length":   {"\xd9\xd9\xf7\xbf" + cborType + cborMeta + "\x4aapiVersion\x42v1\xff", ""},
		"CBOR with a longer length": {"\xd9\xd9\xf7\xb8\x03" + cborType + cborMeta + "\x4aapiVersion\x42v1", ""},
		"CBOR with a number as key": {"\xd9\xd9\xf7\xa4\x01\x01" + cborType + cborMeta + "\x4aapiVersion\x42v1", ""},
		"CBOR of a huge map":        {"\xd9\xd9\xf7\xbb\xff\xff\xff\xff\xff\xff\xff\xff", ""},
		"CBOR that is deep":         {"\xd9\xd9\xf7\xa4\x41a" + strings.Repeat("\x81", 100_000) + "\x00" + cborType + cborMeta + "\x4aapiVersion\x42v1", ""},
	} {
		o, ok := parseObject([]byte(test.data))
		if ok != (test.want != "") || ok && o.namespace+"/"+o.name != test.want {
			t.Errorf("%s: %+v, %v, want %q", name, o, ok, test.want)
		}
	}
	for _, whole := range []string{string(good), cbor, `{"apiVersion":"apps/v1","kind":"Widget","metadata":{"name":"w"}}` + "\n"} {
		for i := range len(whole) - 1 { // JSON may lack its line feed
			if _, ok := parseObject([]byte(whole[:i])); ok {
				t.Errorf("%q, cut at %d: taken", whole, i)
			}
		}
	}
}

// TestFits: an object belongs under keys that end with its namespace and name, as whole parts.
func TestFits(t *testing.T) {
	for key, want := range map[string]bool{
		"/registry/secrets/ns/s1": true, "/other/prefix/ns/s1": true, "/registry/secrets/ns/s1/": false, "/registry/secrets/ns/xs1": false, "/registry/secrets/xns/s1": false,
		"/registry/secrets/ns/s2": false, "/registry/secrets/other/s1": false, "ns/s1": false, "/s1": false, "": false,
	} {
		if o := (object{"ns", "s1"}); o.fits([]byte(key)) != want {
			t.Errorf("%q: %v", key, !want)
		}
	}
	if o := (object{"", "n"}); !o.fits([]byte("/registry/minions/n")) || o.fits([]byte("/registry/minions/m")) {
		t.Error("an object without a namespace")
	}
	if o := (object{}); !o.fits([]byte("/registry/ranges/serviceips")) {
		t.Error("an object without a name")
	}
}

// TestNoPaddingOracle: who knows an object and its ciphertext and appends blocks to it, or puts
// others in, learns nothing of them from which values open: no byte before the target's block, one
// of which makes its padding good, makes one open.
func TestNoPaddingOracle(t *testing.T) {
	block, err := aes.NewCipher(bytes.Repeat([]byte{7}, 32))
	if err != nil {
		t.Fatal(err)
	}
	open := cbcOpener(block)
	seal := func(plaintext []byte) []byte {
		n := aes.BlockSize - len(plaintext)%aes.BlockSize
		padded := append(bytes.Clone(plaintext), bytes.Repeat([]byte{byte(n)}, n)...)
		out := make([]byte, aes.BlockSize+len(padded))
		rand.Read(out[:aes.BlockSize])
		cipher.NewCBCEncrypter(block, out[:aes.BlockSize]).CryptBlocks(out[aes.BlockSize:], padded)
		return out
	}
	key := []byte("/registry/configmaps/ns/mine")
	// The attacker's own object: what it ends with is data, so that anything may stand there, and
	// its last block is 11 bytes of it, the end, and one byte of padding.
	var known []byte
	for n := 100; known == nil || len(known)%aes.BlockSize != 15; n++ {
		known = stored(message(1, message(1, "mine", 3, "ns"), 3, message(1, "k", 2, bytes.Repeat([]byte{'x'}, n))))
	}
	mine := seal(known)
	if _, ok := open(key, mine); !ok {
		t.Fatal("the object itself does not open")
	}
	target := make([]byte, aes.BlockSize)
	rand.Read(target)
	padded := 0
	for name, front := range map[string][]byte{"appended": mine, "in place of the end": mine[:len(mine)-2*aes.BlockSize], "alone": mine[:aes.BlockSize]} {
		forged := append(bytes.Clone(front), make([]byte, aes.BlockSize)...)
		rand.Read(forged[len(front):])
		forged = append(forged, target...)
		for guess := range 256 {
			forged[len(forged)-aes.BlockSize-1] = byte(guess)
			out := make([]byte, len(forged)-aes.BlockSize)
			cipher.NewCBCDecrypter(block, forged[:aes.BlockSize]).CryptBlocks(out, forged[aes.BlockSize:])
			if _, ok := unpad(out); ok {
				padded++
			}
			if _, ok := open(key, forged); ok {
				t.Errorf("%s: guess %d opens", name, guess)
			}
		}
	}
	if padded < 3 {
		t.Errorf("the padding was good %d times: this proves nothing", padded)
	}
}

// FuzzParseObject: no bytes make it panic, and what it takes is text, or ends as an object does.
func FuzzParseObject(f *testing.F) {
	f.Add(stored(message(1, message(1, "s1", 3, "ns"), 2, "x")))
	f.Add([]byte(`{"apiVersion":"v1","kind":"Widget","metadata":{"name":"w"}}`))
	f.Add([]byte("\xd9\xd9\xf7\xa3\x44kind\x46Widget\x48metadata\xa0\x4aapiVersion\x42v1"))
	f.Fuzz(func(t *testing.T, b []byte) {
		was := bytes.Clone(b)
		if _, ok := parseObject(b); ok && bytes.HasPrefix(b, []byte(protobufMark)) && !bytes.HasSuffix(b, []byte{0x1a, 0, 0x22, 0}) {
			t.Errorf("%q", b)
		}
		if !bytes.Equal(was, b) {
			t.Error("the bytes were changed")
		}
	})
}
