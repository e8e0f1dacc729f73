package alibaba

import (
	"bytes"
	"context"
	"encoding/base64"
	"net/http"
	"strings"
	"testing"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// faultCase is a fault and what must become of it.
type faultCase struct {
	name  string
	fault kmsdouble.FaultSpec
	class kmsclient.Class
	code  string
}

// faultCases are faults that spoil any operation in the same way.
func faultCases() []faultCase {
	cases := []faultCase{
		{"throttled", kmsdouble.FaultSpec{Kind: kmsdouble.Throttle}, kmsclient.ClassUnavailable, "Rejected.Throttling"},
		{"throttled user", kmsdouble.FaultSpec{Kind: kmsdouble.Throttle, Status: 400, Code: "Throttling.User"}, kmsclient.ClassUnavailable, "Throttling.User"},
		{"503", kmsdouble.FaultSpec{Kind: kmsdouble.ServerError}, kmsclient.ClassUnavailable, "ServiceUnavailableTemporary"},
		{"500", kmsdouble.FaultSpec{Kind: kmsdouble.ServerError, Status: 500, Code: "InternalFailure"}, kmsclient.ClassUnavailable, "InternalFailure"},
		{"500 unknown", kmsdouble.FaultSpec{Kind: kmsdouble.ServerError, Status: 500, Code: "Strange.Thing"}, kmsclient.ClassUnavailable, "Strange.Thing"},
		{"slow", kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Status: 409, Code: "Rejected.Unavailable"}, kmsclient.ClassUnavailable, "Rejected.Unavailable"},
		{"nonce", kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Code: "SignatureNonceUsed"}, kmsclient.ClassUnavailable, "SignatureNonceUsed"},
		{"forbidden", kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Status: 403, Code: "Forbidden.NoPermission"}, kmsclient.ClassDenied, "Forbidden.NoPermission"},
		{"in debt", kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Status: 403, Code: "Forbidden.InDebtOverdue"}, kmsclient.ClassDenied, "Forbidden.InDebtOverdue"},
		{"unknown 403", kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Status: 403, Code: "NoPermission"}, kmsclient.ClassDenied, "NoPermission"},
		{"skew", kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Code: "InvalidTimeStamp.Expired"}, kmsclient.ClassDenied, "InvalidTimeStamp.Expired"},
		{"bad parameter", kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode}, kmsclient.ClassInvalid, "InvalidParameter"},
		{"bad ciphertext", kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Code: "InvalidCiphertext.Malformed"}, kmsclient.ClassInvalid, "InvalidCiphertext.Malformed"},
		{"bad parameter on 429", kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Status: 429}, kmsclient.ClassUnavailable, "InvalidParameter"},
		{"limit", kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Code: "Rejected.LimitExceeded"}, kmsclient.ClassContract, "Rejected.LimitExceeded"},
		{"missing parameter", kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Code: "MissingParameter"}, kmsclient.ClassContract, "MissingParameter"},
		{"upgrade", kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Status: 409, Code: "Rejected.InstanceUpgrading"}, kmsclient.ClassUnavailable, "Rejected.InstanceUpgrading"},
		{"conflict", kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Status: 409, Code: "OperationConflict"}, kmsclient.ClassUnavailable, "OperationConflict"},
		{"echoed token as code", kmsdouble.FaultSpec{Kind: kmsdouble.EchoError}, kmsclient.ClassContract, ""},
		{"echo", kmsdouble.FaultSpec{Kind: kmsdouble.EchoError, Code: "SignatureDoesNotMatch"}, kmsclient.ClassDenied, "SignatureDoesNotMatch"},
		{"echo on 500", kmsdouble.FaultSpec{Kind: kmsdouble.EchoError, Status: 500, Code: canaryID}, kmsclient.ClassUnavailable, ""},
		{"numeric code", kmsdouble.FaultSpec{Kind: kmsdouble.NumericCode}, kmsclient.ClassContract, ""},
		{"numeric code on 500", kmsdouble.FaultSpec{Kind: kmsdouble.NumericCode, Status: 500}, kmsclient.ClassUnavailable, ""},
		{"HTML", kmsdouble.FaultSpec{Kind: kmsdouble.HTML}, kmsclient.ClassUnavailable, ""},
		{"HTML 502", kmsdouble.FaultSpec{Kind: kmsdouble.HTML, Status: 502}, kmsclient.ClassUnavailable, ""},
		{"HTML 403", kmsdouble.FaultSpec{Kind: kmsdouble.HTML, Status: 403}, kmsclient.ClassDenied, ""},
		{"HTML 404", kmsdouble.FaultSpec{Kind: kmsdouble.HTML, Status: 404}, kmsclient.ClassContract, ""},
		{"empty", kmsdouble.FaultSpec{Kind: kmsdouble.EmptyAnswer}, kmsclient.ClassContract, ""},
		{"empty 204", kmsdouble.FaultSpec{Kind: kmsdouble.EmptyAnswer, Status: 204}, kmsclient.ClassContract, ""},
		{"empty 429", kmsdouble.FaultSpec{Kind: kmsdouble.EmptyAnswer, Status: 429}, kmsclient.ClassUnavailable, ""},
		{"redirect 302", kmsdouble.FaultSpec{Kind: kmsdouble.Redirect, Status: 302}, kmsclient.ClassUnavailable, ""},
		{"redirect 307", kmsdouble.FaultSpec{Kind: kmsdouble.Redirect}, kmsclient.ClassUnavailable, ""},
		{"redirect 308", kmsdouble.FaultSpec{Kind: kmsdouble.Redirect, Status: 308}, kmsclient.ClassUnavailable, ""},
		{"too large", kmsdouble.FaultSpec{Kind: kmsdouble.TooLarge}, kmsclient.ClassContract, ""},
		{"too large error", kmsdouble.FaultSpec{Kind: kmsdouble.TooLarge, Status: 500}, kmsclient.ClassContract, ""},
		{"cut", kmsdouble.FaultSpec{Kind: kmsdouble.Cut}, kmsclient.ClassUnavailable, ""},
		{"cut in the answer", kmsdouble.FaultSpec{Kind: kmsdouble.CutAnswer}, kmsclient.ClassUnavailable, ""},
		{"no version", kmsdouble.FaultSpec{Kind: kmsdouble.PartialAnswer, Fields: []string{"KeyVersionId", "PrimaryKeyVersion"}}, kmsclient.ClassContract, ""},
		{"no key", kmsdouble.FaultSpec{Kind: kmsdouble.PartialAnswer, Fields: []string{"KeyId"}}, kmsclient.ClassContract, ""},
		{"no payload", kmsdouble.FaultSpec{Kind: kmsdouble.PartialAnswer, Fields: []string{"Plaintext", "CiphertextBlob", "KeyState"}}, kmsclient.ClassContract, ""},
		{"wrong key", kmsdouble.FaultSpec{Kind: kmsdouble.WrongKeyID}, kmsclient.ClassContract, ""},
		{"numbers for text", kmsdouble.FaultSpec{Kind: kmsdouble.ForgedAnswer, Set: map[string]any{"KeyId": 7, "KeyState": 7}}, kmsclient.ClassContract, ""},
		{"objects for text", kmsdouble.FaultSpec{Kind: kmsdouble.ForgedAnswer, Set: map[string]any{"KeyId": map[string]any{}}}, kmsclient.ClassUnavailable, ""},
		{"key with slash", kmsdouble.FaultSpec{Kind: kmsdouble.ForgedAnswer, Set: map[string]any{"KeyId": "a/b"}}, kmsclient.ClassContract, ""},
		{"long key", kmsdouble.FaultSpec{Kind: kmsdouble.ForgedAnswer, Set: map[string]any{"KeyId": strings.Repeat("k", 2000)}}, kmsclient.ClassContract, ""},
		{"payload not base64", kmsdouble.FaultSpec{Kind: kmsdouble.ForgedAnswer, Set: map[string]any{"Plaintext": "!", "CiphertextBlob": "two words", "KeyState": "Odd"}}, kmsclient.ClassContract, ""},
	}
	for i, n := 0, len(cases); i < n; i++ {
		c := cases[i]
		c.name, c.fault.Applied = c.name+", applied", true
		cases = append(cases, c)
	}
	return cases
}

// TestFaults checks the class of each fault in each operation, and that no error says too much.
func TestFaults(t *testing.T) {
	d, b, logs := newCanary(t)
	key, err := b.GenerateDataKey(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	secret := base64.StdEncoding.EncodeToString(key.Plaintext)
	for _, tc := range faultCases() {
		for op, call := range operations(b, key) {
			t.Run(tc.name+"/"+op, func(t *testing.T) {
				d.SetFault(func(*http.Request) *kmsdouble.FaultSpec { return &tc.fault })
				err := call(t.Context())
				e := asError(t, err)
				answered := tc.class == kmsclient.ClassUnavailable && tc.fault.Status == http.StatusConflict
				if e.Class() != tc.class || (e.Reason == kmsclient.Failing) != answered || e.Code != tc.code || e.Op != op || !strings.Contains(e.KeyID, kmsdouble.DefaultKeyID) {
					t.Errorf("got %+v", e)
				}
				texts := allTexts(err)
				checkNoCanary(t, "error", texts)
				if strings.Contains(texts, secret) || bytes.Contains([]byte(texts), key.Plaintext) {
					t.Errorf("error holds the seed: %s", texts)
				}
			})
		}
	}
	d.ClearFaults()
	for op, call := range operations(b, key) {
		if err := call(t.Context()); err != nil {
			t.Errorf("%s after all faults: %v", op, err)
		}
	}
	checkNoCanary(t, "log", logs.String())
}

// operations are the operations by the name that their errors must have.
func operations(b *Backend, key *kmsclient.DataKey) map[string]func(context.Context) error {
	return map[string]func(context.Context) error{
		"GenerateDataKey": func(ctx context.Context) error { _, err := b.GenerateDataKey(ctx, "uid"); return err },
		"Encrypt":         func(ctx context.Context) error { _, err := b.Encrypt(ctx, "uid", []byte(canaryPlaintext)); return err },
		"Status":          func(ctx context.Context) error { _, err := b.Status(ctx); return err },
		"Decrypt": func(ctx context.Context) error {
			_, err := b.Decrypt(ctx, "uid", &service.DecryptRequest{Ciphertext: key.Ciphertext, KeyID: key.KeyID})
			return err
		},
	}
}

// TestFaultsAreAppliedOrNot checks the double's two forms, which the tests above rely on.
func TestFaultsAreAppliedOrNot(t *testing.T) {
	d, b, _ := newCanary(t)
	for _, applied := range []bool{false, true} {
		before := d.Applied("GenerateDataKey")
		d.Inject("GenerateDataKey", kmsdouble.FaultSpec{Kind: kmsdouble.Cut, Applied: applied})
		if _, err := b.GenerateDataKey(t.Context(), ""); err == nil {
			t.Error("no error")
		}
		if got := d.Applied("GenerateDataKey") - before; got != map[bool]int{false: 0, true: 1}[applied] {
			t.Errorf("applied=%v: carried out %d times", applied, got)
		}
	}
}

// FuzzAnswer has the KMS answer anything at all: each operation ends with a safe error or a checked
// result.
func FuzzAnswer(f *testing.F) {
	uuid := "8252E4E4-37F3-4E41-B4F6-5A24E6E48D11"
	for _, seed := range []struct {
		status uint16
		body   string
	}{
		{200, ""}, {200, "{}"}, {200, "null"}, {200, "[]"}, {200, `"x"`}, {400, `{"Code":7}`}, {400, `{"Code":"A","RequestId":{}}`}, {500, "<html>"},
		{400, `{"Code":"InvalidParameter","Message":["x"],"AccessDeniedDetail":"x"}`}, {299, "{\"KeyId\":\"\x00\"}"}, {101, ""}, {304, ""}, {600, "x"},
		{200, `{"KeyId":"k","KeyVersionId":"v","CiphertextBlob":"QUFB","Plaintext":"QUFB","RequestId":"` + uuid + `","KeyMetadata":{"KeyId":"k","KeyState":"Enabled","PrimaryKeyVersion":"v"}}`},
	} {
		f.Add(seed.status, []byte(seed.body))
	}
	d := kmsdouble.New(f, kmsdouble.Config{})
	f.Setenv("ALIBABA_CLOUD_ACCESS_KEY_ID", kmsdouble.DefaultAccessKeyID)
	f.Setenv("ALIBABA_CLOUD_ACCESS_KEY_SECRET", kmsdouble.DefaultAccessKeySecret)
	b, err := New(Config{Region: d.Region(), KeyID: kmsdouble.DefaultAlias, Endpoint: d.Endpoint(), CAFile: d.CAFile()})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { _ = b.Close() })
	key := &kmsclient.DataKey{Ciphertext: []byte("QUFB"), KeyID: "k/v"}
	f.Fuzz(func(t *testing.T, status uint16, body []byte) {
		fault := kmsdouble.FaultSpec{Kind: kmsdouble.Raw, Status: 200 + int(status)%400, Body: body}
		d.SetFault(func(*http.Request) *kmsdouble.FaultSpec { return &fault })
		for op, call := range operations(b, key) {
			if err := call(t.Context()); err != nil {
				if e := asError(t, err); e.Op != op || len(err.Error()) > 600 {
					t.Errorf("%s: %+v", op, e)
				}
			}
		}
	})
}

func TestRequestIDs(t *testing.T) {
	d, b, _ := newCanary(t)
	d.Inject("", kmsdouble.FaultSpec{Kind: kmsdouble.Throttle})
	_, err := b.GenerateDataKey(t.Context(), "")
	records := d.Records()
	if e := asError(t, err); e.RequestID != records[0].RequestID || e.HTTPStatus != 429 {
		t.Errorf("%+v, want request ID %s", e, records[0].RequestID)
	}
}

func TestPatternsTakeTheVendorsShapes(t *testing.T) {
	for _, code := range []string{"Rejected.Throttling", "InvalidAccessKeyId.NotFound", "SignatureDoesNotMatch", "InvalidAction.NotFound"} {
		if safeCode(code) != code {
			t.Errorf("code %s is dropped", code)
		}
	}
	for _, id := range []string{"4bd560a1-729e-45f1-a3d9-b2a33d61046b", "475f1620-b9d3-4d35-b5c6-3fbdd941423d", "8252E4E4-37F3-4E41-B4F6-5A24E6E48D11"} {
		if safeRequestID(id) != id {
			t.Errorf("request ID %s is dropped", id)
		}
	}
	for _, odd := range []string{"", "x", "two words", "a&b=c", strings.Repeat("Aa", 100), "CAIS+/token=="} {
		if safeCode(odd) != "" || safeRequestID(odd) != "" {
			t.Errorf("%q passes", odd)
		}
	}
}
