package interop

import (
	"bytes"
	"context"
	"crypto/rand"
	"fmt"
	mathrand "math/rand"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/apitesting/fuzzer"
	"k8s.io/apimachinery/pkg/api/meta"
	metafuzzer "k8s.io/apimachinery/pkg/apis/meta/fuzzer"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/runtime/serializer"
	"k8s.io/apimachinery/pkg/runtime/serializer/cbor"
	"k8s.io/apimachinery/pkg/runtime/serializer/json"
	"k8s.io/apimachinery/pkg/runtime/serializer/protobuf"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/client-go/kubernetes/scheme"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/kubelegacy"
)

// encoders encode objects as kube-apiserver stores them.
var encoders = map[string]runtime.Encoder{
	"protobuf": protobuf.NewSerializer(scheme.Scheme, scheme.Scheme),
	"json":     json.NewSerializerWithOptions(json.DefaultMetaFactory, scheme.Scheme, scheme.Scheme, json.SerializerOptions{}),
	"cbor":     cbor.NewSerializer(scheme.Scheme, scheme.Scheme),
}

func encoded(tb testing.TB, format string, o runtime.Object) string {
	tb.Helper()
	var b bytes.Buffer
	if err := encoders[format].Encode(o, &b); err != nil {
		tb.Fatalf("%s: %v", format, err)
	}
	return b.String()
}

// storedSecret is a Secret as kube-apiserver stores it.
func storedSecret(tb testing.TB, namespace, name string, data []byte) string {
	return encoded(tb, "protobuf", &corev1.Secret{
		TypeMeta: metav1.TypeMeta{APIVersion: "v1", Kind: "Secret"}, ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name}, Data: map[string][]byte{"data": data},
		Type: corev1.SecretTypeOpaque,
	})
}

// storedWidget is a custom object as kube-apiserver stores it.
func storedWidget(tb testing.TB, inCBOR bool) string {
	o := &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "example.com/v1", "kind": "Widget", "metadata": map[string]any{"name": "w", "namespace": "ns"},
		"spec": map[string]any{"text": "ü<", "numbers": []any{int64(-1), int64(1 << 40), 1.5, 1e300}, "none": nil, "yes": true},
	}}
	if inCBOR {
		return encoded(tb, "cbor", o)
	}
	return encoded(tb, "json", o)
}

// wholeBlocks is a Secret whose serialized form is a multiple of the AES block size.
func wholeBlocks(tb testing.TB, namespace, name string) string {
	for n := range 16 {
		if s := storedSecret(tb, namespace, name, bytes.Repeat([]byte{'x'}, n)); len(s)%16 == 0 {
			return s
		}
	}
	tb.Fatal("none fills its blocks")
	return ""
}

// TestStoredObjects checks that the reader of aescbc accepts every type of Kubernetes' API that has
// a name, with random content, in each form that kube-apiserver stores, and that secretbox does
// too. None may decrypt under another etcd key.
func TestStoredObjects(t *testing.T) {
	fill := fuzzer.FuzzerFor(fuzzer.MergeFuzzerFuncs(metafuzzer.Funcs), mathrand.NewSource(1), serializer.NewCodecFactory(scheme.Scheme))
	secret := make([]byte, 32)
	rand.Read(secret)
	types := 0
	for gvk := range scheme.Scheme.AllKnownTypes() {
		if gvk.Version == runtime.APIVersionInternal || gvk.Group == metav1.GroupName {
			continue
		}
		for range 3 {
			o, err := scheme.Scheme.New(gvk)
			if err != nil {
				t.Fatal(err)
			}
			m, err := meta.Accessor(o)
			if err != nil {
				break // a list, or options
			}
			types++
			fill.Fill(o)
			o.GetObjectKind().SetGroupVersionKind(gvk)
			m.SetName("name")
			m.SetNamespace("ns")
			for format := range encoders {
				checkStored(t, gvk, format, secret, []byte(encoded(t, format, o)))
			}
		}
	}
	if types < 300 {
		t.Errorf("only %d objects", types)
	}
}

func checkStored(t *testing.T, gvk schema.GroupVersionKind, format string, secret, plaintext []byte) {
	t.Helper()
	for _, typ := range []kubelegacy.Type{kubelegacy.AESCBC, kubelegacy.Secretbox} {
		reader, err := kubelegacy.New(kubelegacy.Config{Type: typ, Keys: []kubelegacy.Key{{Name: "key1", Secret: secret}}})
		if err != nil {
			t.Fatal(err)
		}
		key := []byte(fmt.Sprintf("/registry/%s/ns/name", strings.ToLower(gvk.Kind)))
		stored, err := kubeLegacy(t, typ, "key1", secret).TransformToStorage(context.Background(), plaintext, value.DefaultContext(key))
		if err != nil {
			t.Fatal(err)
		}
		if got, _, err := reader.Open(key, stored); err != nil || !bytes.Equal(got, plaintext) {
			t.Errorf("%s in %s, %s: %v", gvk, format, typ, err)
		}
		for _, moved := range []string{"/registry/secrets/ns/other", "/registry/secrets/other/name", "/registry/secrets/ns/xname", "name"} {
			if _, _, err := reader.Open([]byte(moved), stored); err == nil {
				t.Errorf("%s in %s, %s: it opens as %s", gvk, format, typ, moved)
			}
		}
	}
}
