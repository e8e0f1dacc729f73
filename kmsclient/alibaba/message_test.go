package alibaba

import (
	"encoding/base64"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// TestDefaultKeyIsRefusedWithItsReason: the vendor's own words for it are in the error, by whatever
// name the key goes.
func TestDefaultKeyIsRefusedWithItsReason(t *testing.T) {
	for _, hsm := range []bool{false, true} {
		for _, name := range []string{"key-hzz65f1cb66fa42qo7z8w", "alias/acs/ecs", "acs:kms:cn-hangzhou:154035569884:key/key-hzz65f1cb66fa42qo7z8w"} {
			d := kmsdouble.New(t, kmsdouble.Config{Keys: []kmsdouble.KeyConfig{{ID: "key-hzz65f1cb66fa42qo7z8w", Alias: "alias/acs/ecs", Default: true, HSM: hsm}}})
			b := newBackend(t, d, func(c *Config) { c.KeyID = name })
			_, err := b.GenerateDataKey(t.Context(), "")
			e := asError(t, err)
			if e.Class() != kmsclient.ClassDenied || !strings.Contains(e.Detail, "the KMS says: This operation for ") || !strings.Contains(e.Detail, " is forbidden by permission system.") {
				t.Errorf("%s: %v", name, err)
			}
			info, err := b.Describe(t.Context())
			if err != nil || info.ProtectionLevel != map[bool]string{false: "SOFTWARE", true: "HSM"}[hsm] || info.Creator != "Ecs" {
				t.Errorf("%s: %+v, %v", name, info, err)
			}
		}
	}
}

// TestSay lets nothing through that is not plain words.
func TestSay(t *testing.T) {
	r := &remote{name: "the KMS", keyID: "alias/etcd", hidden: []string{"cluster one", ""}}
	for message, want := range map[string]string{
		"":                                   "",
		"Specified access key is not found.": "; the KMS says: Specified access key is not found.",
		"The key (a 'service-managed' one) can't\n":       "; the KMS says: The key (a 'service-managed' one) can't",
		"This operation for alias/etcd is off.":           "; the KMS says: This operation for (key) is off.",
		"No key-hzz65f1cb66fa42qo7z8w here.":              "; the KMS says: No key-hzz65f1cb66fa42qo7z8w here.",
		`Version "8252e4e4-37f3-4e41-b4f6-5a24e6e48d11".`: `; the KMS says: Version "8252e4e4-37f3-4e41-b4f6-5a24e6e48d11".`,
		"The context cluster one is wrong":                "",
		"The signature ABCDEFGHIJKLMNOPQRSTU is wrong":    "",
		"The token CAIS1 is wrong":                        "",
		"a=b":                                             "",
		"a%2Fb":                                           "",
		"{a}":                                             "",
		"é":                                               "",
		"\x1b[31m":                                        "",
		strings.Repeat("long ", 50):                       "",
		canarySecret:                                      "",
		canaryToken:                                       "",
		canaryOIDC:                                        "",
		canaryPlaintext:                                   "",
		base64.StdEncoding.EncodeToString([]byte(canaryPlaintext)):    "",
		"The server string to sign is:POST&%2F&AccessKeyId%3D" + "x.": "",
	} {
		if got := r.safeMessage(message); got != want {
			t.Errorf("%q became %q, want %q", message, got, want)
		}
	}
}
