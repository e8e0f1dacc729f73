package inventory

import (
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

// TestSeedOf: what the KMS is given identifies a seed, so that a value that was damaged says
// nothing of those of a good seed.
func TestSeedOf(t *testing.T) {
	t.Parallel()
	make := func(provider, keyID, source string, annotations map[string][]byte, data string) []byte {
		o := envelope.Object{Header: envelope.Header{Type: envelope.TypeSeed, KeyID: keyID, Source: []byte(source), Annotations: annotations}, Data: []byte(data + strings.Repeat(".", 100))}
		b, err := o.Append([]byte("k8s:enc:kms:v2:" + provider + ":"))
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	rule := &Rule{Prefix: "/a/"}
	note := map[string][]byte{"a.example.com": []byte("1"), "b.example.com": []byte("2")}
	first, marker, ok := SeedOf(rule, make("main", "1", "source", note, "one"))
	if !ok || marker != "k8s:enc:kms:v2:main:" {
		t.Fatalf("%q, %v", marker, ok)
	}
	if same, _, _ := SeedOf(rule, make("main", "1", "source", note, "two")); same != first {
		t.Error("two values of one seed have two")
	}
	if other, _, _ := SeedOf(&Rule{Prefix: "/b/"}, make("main", "1", "source", note, "one")); other == first {
		t.Error("two rules have one seed: one of them may have a recovery copy")
	}
	for what, b := range map[string][]byte{
		"provider": make("other", "1", "source", note, ""), "key ID": make("main", "2", "source", note, ""), "source": make("main", "1", "sourcf", note, ""),
		"no annotations": make("main", "1", "source", nil, ""), "an annotation": make("main", "1", "source", map[string][]byte{"a.example.com": []byte("1"), "b.example.com": []byte("3")}, ""),
	} {
		if other, _, ok := SeedOf(rule, b); !ok || other == first {
			t.Errorf("another %s is the same seed", what)
		}
	}
	for _, none := range []string{"", "plain", "k8s:enc:kms:v2:main:junk", "k8s:enc:aescbc:v1:key1:x"} {
		if _, _, ok := SeedOf(rule, []byte(none)); ok {
			t.Errorf("%q has a seed", none)
		}
	}
}
