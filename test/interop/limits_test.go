package interop

import (
	"bytes"
	"context"
	"maps"
	"strings"
	"testing"

	"google.golang.org/protobuf/proto"
	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2"
	kmstypes "k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2/v2"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

// accepted reports whether kube-apiserver accepts an object, and fails unless we decide in the same
// way.
func accepted(t testing.TB, what string, object []byte) bool {
	t.Helper()
	theirs := &kmstypes.EncryptedObject{}
	theirErr := proto.Unmarshal(object, theirs)
	if theirErr == nil {
		theirErr = kmsv2.ValidateEncryptedObject(theirs)
	}
	o, err := envelope.Parse(object)
	if (err == nil) != (theirErr == nil) {
		t.Errorf("%s: we say %v, kube-apiserver says %v", what, err, theirErr)
		return false
	}
	if err != nil {
		return false
	}
	if !bytes.Equal(o.Data, theirs.EncryptedData) || o.KeyID != theirs.KeyID || !bytes.Equal(o.Source, theirs.EncryptedDEKSource) ||
		o.Type != envelope.Type(theirs.EncryptedDEKSourceType) || !maps.EqualFunc(o.Annotations, theirs.Annotations, bytes.Equal) {
		t.Errorf("%s: we read %+v, kube-apiserver %+v", what, o, theirs)
	}
	again, err := o.Append(nil)
	if err != nil {
		t.Errorf("%s: what was read is not written again: %v", what, err)
	}
	back := &kmstypes.EncryptedObject{}
	if err := proto.Unmarshal(again, back); err != nil {
		t.Errorf("%s: kube-apiserver does not read what we write again: %v", what, err)
	}
	theirs.ProtoReflect().SetUnknown(nil)
	if !proto.Equal(back, theirs) {
		t.Errorf("%s: kube-apiserver reads something else in what we write again", what)
	}
	return true
}

// TestFieldLimits checks every field at its limits, just below and above.
func TestFieldLimits(t *testing.T) {
	label := strings.Repeat("a", 63)
	longest := label + "." + label + "." + label + "." + strings.Repeat("a", 61)
	annotation := func(key string, size int) func(*kmstypes.EncryptedObject) {
		return func(o *kmstypes.EncryptedObject) {
			if o.Annotations == nil {
				o.Annotations = map[string][]byte{}
			}
			o.Annotations[key] = make([]byte, size)
		}
	}
	for _, c := range []struct {
		what   string
		change func(*kmstypes.EncryptedObject)
		want   bool
	}{
		{"as it is", func(*kmstypes.EncryptedObject) {}, true},
		{"no data", func(o *kmstypes.EncryptedObject) { o.EncryptedData = nil }, false},
		{"one byte of data", func(o *kmstypes.EncryptedObject) { o.EncryptedData = []byte{0} }, true},
		{"no key ID", func(o *kmstypes.EncryptedObject) { o.KeyID = "" }, false},
		{"key ID of 1024", func(o *kmstypes.EncryptedObject) { o.KeyID = strings.Repeat("k", 1024) }, true},
		{"key ID of 1025", func(o *kmstypes.EncryptedObject) { o.KeyID = strings.Repeat("k", 1025) }, false},
		{"key ID of 1025 in 513 characters", func(o *kmstypes.EncryptedObject) { o.KeyID = strings.Repeat("ü", 512) + "k" }, false},
		{"key ID with NUL", func(o *kmstypes.EncryptedObject) { o.KeyID = "a\x00b" }, true},
		{"no seed", func(o *kmstypes.EncryptedObject) { o.EncryptedDEKSource = nil }, false},
		{"seed of 1024", func(o *kmstypes.EncryptedObject) { o.EncryptedDEKSource = make([]byte, 1024) }, true},
		{"seed of 1025", func(o *kmstypes.EncryptedObject) { o.EncryptedDEKSource = make([]byte, 1025) }, false},
		{"type 0", func(o *kmstypes.EncryptedObject) { o.EncryptedDEKSourceType = 0 }, true},
		{"type 2", func(o *kmstypes.EncryptedObject) { o.EncryptedDEKSourceType = 2 }, false},
		{"type -1", func(o *kmstypes.EncryptedObject) { o.EncryptedDEKSourceType = -1 }, false},
		{"annotations of 32768", annotation("a.example.com", 32768-len("a.example.com")), true},
		{"annotations of 32769", annotation("a.example.com", 32769-len("a.example.com")), false},
		{"two annotations of 32769", func(o *kmstypes.EncryptedObject) {
			annotation("a.example.com", 16384-len("a.example.com"))(o)
			annotation("b.example.com", 16385-len("b.example.com"))(o)
		}, false},
		{"annotation a.b", annotation("a.b", 0), true},
		{"annotation a.b.", annotation("a.b.", 0), true},
		{"annotation a.b..", annotation("a.b..", 0), false},
		{"annotation a", annotation("a", 0), false},
		{"annotation a.", annotation("a.", 0), false},
		{"annotation .a", annotation(".a", 0), false},
		{"annotation .", annotation(".", 0), false},
		{"annotation a..b", annotation("a..b", 0), false},
		{"annotation A.b", annotation("A.b", 0), false},
		{"annotation a_b.c", annotation("a_b.c", 0), false},
		{"annotation -a.b", annotation("-a.b", 0), false},
		{"annotation a.b-", annotation("a.b-", 0), false},
		{"annotation 1.2", annotation("1.2", 0), true},
		{"annotation ü.b", annotation("ü.b", 0), false},
		{"annotation with a label of 63", annotation(label+".b", 0), true},
		{"annotation with a label of 64", annotation(label+"a.b", 0), false},
		{"annotation of 253", annotation(longest, 0), true},
		{"annotation of 253 and a dot", annotation(longest+".", 0), true},
		{"annotation of 254", annotation("a"+longest, 0), false},
		{"recovery copy", annotation("dr.recovery.etcd-kms-proxy.io", 200), true},
		{"recipients of an age copy", annotation("dr.recovery-id.etcd-kms-proxy.io", 20), true},
	} {
		o := &kmstypes.EncryptedObject{EncryptedData: make([]byte, 60), KeyID: "key-1", EncryptedDEKSource: []byte("wrapped"), EncryptedDEKSourceType: 1}
		c.change(o)
		object, err := proto.Marshal(o)
		if err != nil {
			t.Fatal(err)
		}
		if got := accepted(t, c.what, object); got != c.want {
			t.Errorf("%s: accepted is %v", c.what, got)
		}
	}
}

// TestPluginLimits has the plugin return fields of the greatest length, and one byte longer. Both
// sides must accept the first, and must not create a DEK seed from the second.
func TestPluginLimits(t *testing.T) {
	for _, c := range []struct {
		what   string
		change func(*plugin)
		want   bool
	}{
		{"key ID of 1024", func(p *plugin) { p.rotate(strings.Repeat("k", 1024)) }, true},
		{"key ID of 1025", func(p *plugin) { p.rotate(strings.Repeat("k", 1025)) }, false},
		{"seed of 1024", func(p *plugin) { p.pad = 1024 }, true},
		{"seed of 1025", func(p *plugin) { p.pad = 1025 }, false},
		{"annotations of 32768", func(p *plugin) { p.annotate = map[string][]byte{"a.example.com": make([]byte, 32768-13)} }, true},
		{"annotations of 32769", func(p *plugin) { p.annotate = map[string][]byte{"a.example.com": make([]byte, 32769-13)} }, false},
		{"annotation without a dot", func(p *plugin) { p.annotate = map[string][]byte{"version": []byte("1")} }, false},
	} {
		t.Run(c.what, func(t *testing.T) {
			p := startPlugin(t, "key-1")
			good := newKube(t, p, provider, envelope.TypeSeed)
			c.change(p)
			we := newOurs(t, p, provider)
			_, err := we.Seal(context.Background(), secretKey, []byte("value"))
			if (err == nil) != c.want {
				t.Errorf("we seal: %v", err)
			}
			_, _, _, theirErr := kmsv2.GenerateTransformer(context.Background(), "uid", good.service, true)
			if (theirErr == nil) != c.want {
				t.Errorf("kube-apiserver makes a seed: %v", theirErr)
			}
			if err != nil || theirErr != nil {
				return
			}
			they := newKube(t, p, provider, envelope.TypeSeed)
			same(t, "read by kube-apiserver", []byte("value"), false)(they.open(secretKey, we.seal(t, secretKey, []byte("value"))))
			same(t, "read by us", []byte("value"), false)(we.open(secretKey, they.seal(t, secretKey, []byte("value"))))
		})
	}
}

// FuzzAgreement passes the same bytes to both decoders: they must accept the same objects with the
// same content.
func FuzzAgreement(f *testing.F) {
	for _, v := range loadVectors(f) {
		_, object, _ := envelope.Split(v.Stored)
		f.Add(object)
		f.Add(append(bytes.Clone(object), object...))
	}
	f.Fuzz(func(t *testing.T, object []byte) { accepted(t, "object", object) })
}
