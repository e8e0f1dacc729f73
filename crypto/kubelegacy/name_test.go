package kubelegacy

import (
	"bytes"
	"strings"
	"testing"
)

// TestKeyName: the name of a key is found whole, whatever it and the payload hold, where that can
// be known.
func TestKeyName(t *testing.T) {
	noise := bytes.Repeat([]byte{0xfe, 1, ':', 'a', ':', 0}, 200)
	blocks := func(n int, begin string) string { return begin + string(noise[:16*n-len(begin)]) }
	const colons = "aescbckey-2025-12-27T23:41:02+08:00"
	for what, c := range map[string]struct {
		stored string
		known  []string
		want   string // type and name, or "" for another format
	}{
		"plain":                     {"k8s:enc:aescbc:v1:key1:" + blocks(2, ""), nil, "aescbc key1"},
		"colons":                    {"k8s:enc:aescbc:v1:" + colons + ":" + blocks(3, ""), nil, "aescbc " + colons},
		"colons, aesgcm":            {"k8s:enc:aesgcm:v1:" + colons + ":" + blocks(3, ""), nil, "aesgcm " + colons},
		"colons, secretbox":         {"k8s:enc:secretbox:v1:" + colons + ":" + blocks(3, ""), nil, "secretbox " + colons},
		"a payload with a colon":    {"k8s:enc:aescbc:v1:key1:" + blocks(2, ":"), nil, "aescbc key1"},
		"a payload like a name":     {"k8s:enc:aescbc:v1:key1:" + blocks(2, "ab:cd:"), nil, "aescbc key1"},
		"known, a payload like it":  {"k8s:enc:aesgcm:v1:key1:" + blocks(2, "ab:cd:"), []string{"key", "key1", "ab"}, "aesgcm key1"},
		"known, of two":             {"k8s:enc:secretbox:v1:a:b:" + blocks(3, ""), []string{"a", "a:b", "a:b:c"}, "secretbox a:b"},
		"a space and other letters": {"k8s:enc:aescbc:v1:the größte key:" + blocks(2, ""), nil, "aescbc the größte key"},
		"not printable":             {"k8s:enc:aescbc:v1:a\x1bb:" + blocks(2, ""), nil, "aescbc a\x1bb"},
		"a payload that is cut":     {"k8s:enc:aescbc:v1:a:b:cut", nil, "aescbc a"},
		"a long name":               {"k8s:enc:aesgcm:v1:" + strings.Repeat("n", 5000) + ":" + blocks(2, ""), nil, "aesgcm " + strings.Repeat("n", 5000)},
		"no name":                   {"k8s:enc:aescbc:v1::" + blocks(2, ""), nil, ""},
		"no end":                    {"k8s:enc:aescbc:v1:key1", nil, ""},
		"marker alone":              {"k8s:enc:aescbc:v1:", nil, ""},
		"KMS":                       {"k8s:enc:kms:v2:key1:" + blocks(2, ""), nil, ""},
		"plaintext":                 {"key1:", nil, ""},
	} {
		typ, name, ok := KeyName([]byte(c.stored), c.known)
		got := ""
		if ok {
			got = string(typ) + " " + name
		}
		if got != c.want {
			t.Errorf("%s: %q, want %q", what, got, c.want)
		}
	}
}

// TestUnknownKeyWithColons: the hint of a value whose key is missing names that key whole.
func TestUnknownKeyWithColons(t *testing.T) {
	const name = "aescbckey-2025-12-27T23:59:30+08:00"
	stored := append([]byte("k8s:enc:aescbc:v1:"+name+":"), bytes.Repeat([]byte{0xfe}, 32)...)
	_, known, err := reader(t, AESCBC, Key{"aescbckey-2025-12-27T23:41:02+08:00", bytes.Repeat([]byte{9}, 32)}).Open(nil, stored)
	if known || err == nil || !strings.Contains(err.Error(), `"`+name+`"`) {
		t.Errorf("%v, %v", known, err)
	}
}
