package interop

import (
	"strings"
	"testing"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

// annotationKeys are keys at the limits of what Kubernetes accepts.
func annotationKeys() []string {
	label := strings.Repeat("a", 63)
	// 253 bytes
	longest := strings.Join([]string{label, label, label, strings.Repeat("b", 61)}, ".")
	return []string{
		"", ".", "..", "a", "a.", ".a", "a.b", "a.b.", "a.b..", ".a.b", "a..b", "1.2", "1.2.", "A.b", "a.B", "a_b.c", "-a.b", "a-.b", "a.-b", "a.b-", "a.b-.", "a--b.c",
		"*.b", "ü.b", "xn--tda.b", "a\xff.b", "a\x00.b", "a.b\n", " a.b", "a/b.c", "request-id.kms.example.com", "request-id.kms.example.com.", "dr.recovery.etcd-kms-proxy.io",
		label + ".b", label + ".b.", label + "a.b", "b." + label, "b." + label + "a", longest, longest + ".", longest + "..", "a" + longest, "a" + longest + ".", longest + ".a",
	}
}

func sameAsKubernetes(t *testing.T, key string) {
	t.Helper()
	if ours, theirs := envelope.IsAnnotationKey(key), len(validation.IsFullyQualifiedDomainName(nil, key)) == 0; ours != theirs {
		t.Errorf("%q: we accept it: %t; Kubernetes: %t", key, ours, theirs)
	}
}

// TestAnnotationKeys checks that we accept the same keys of annotations as Kubernetes.
func TestAnnotationKeys(t *testing.T) {
	for _, key := range annotationKeys() {
		sameAsKubernetes(t, key)
	}
}

// FuzzAnnotationKeys checks the same for any key.
func FuzzAnnotationKeys(f *testing.F) {
	for _, key := range annotationKeys() {
		f.Add(key)
	}
	f.Fuzz(func(t *testing.T, key string) { sameAsKubernetes(t, key) })
}
