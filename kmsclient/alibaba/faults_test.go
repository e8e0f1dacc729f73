package alibaba

import (
	"bytes"
	"context"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/alibaba/kmsdouble"
)

// What no error and no log line may hold.
const (
	canaryID        = "LTAICANARYAccessKeyIdCANARY"
	canarySecret    = "CANARYsecretCANARYsecretCANARY"
	canaryToken     = "CAISCANARYtokenCANARY+/tokenCANARY=="
	canaryPlaintext = "CANARYplaintextCANARYplaintext!!"
	canaryContext   = "CANARYcontextCANARY"
)

// newCanary returns a double and a backend whose every secret is a canary, and the backend's log.
func newCanary(t *testing.T) (*kmsdouble.Double, *Backend, *safeBuffer) {
	t.Helper()
	d := kmsdouble.New(t, kmsdouble.Config{AccessKeys: []kmsdouble.AccessKey{{ID: canaryID, Secret: canarySecret, Token: canaryToken}}})
	logs := &safeBuffer{}
	b := newBackend(t, d, func(c *Config) {
		t.Setenv("ALIBABA_CLOUD_ACCESS_KEY_ID", canaryID)
		t.Setenv("ALIBABA_CLOUD_ACCESS_KEY_SECRET", canarySecret)
		t.Setenv("ALIBABA_CLOUD_SECURITY_TOKEN", canaryToken)
		c.Credentials.Type = STS
		c.EncryptionContext = map[string]string{"secret": canaryContext}
		c.Logger = slog.New(slog.NewJSONHandler(logs, nil))
	})
	return d, b, logs
}

// safeBuffer is a buffer for a logger that several goroutines use.
type safeBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (s *safeBuffer) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.Write(p)
}

func (s *safeBuffer) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.b.String()
}

// checkNoCanary fails if a text holds a canary, plain or encoded, or what looks like a part of a request.
func checkNoCanary(t *testing.T, where, text string) {
	t.Helper()
	lower := strings.ToLower(text)
	for _, canary := range []string{canaryID, canarySecret, canaryToken, canaryPlaintext, canaryContext} {
		for _, form := range []string{canary, url.QueryEscape(canary), base64.StdEncoding.EncodeToString([]byte(canary)), url.QueryEscape(base64.StdEncoding.EncodeToString([]byte(canary)))} {
			if strings.Contains(lower, strings.ToLower(form)) {
				t.Errorf("%s holds a canary: %s", where, text)
			}
		}
	}
	for _, part := range []string{"canary", "accesskeyid=", "signature=", "signaturenonce=", "securitytoken=", "plaintext=", "ciphertextblob="} {
		if strings.Contains(lower, part) {
			t.Errorf("%s holds %q: %s", where, part, text)
		}
	}
}

// allTexts returns every way in which an error may be printed, its chain included.
func allTexts(err error) string {
	var b strings.Builder
	var walk func(error)
	walk = func(err error) {
		if err == nil {
			return
		}
		fmt.Fprintf(&b, "%v\n%+v\n%#v\n%q\n", err, err, err, err)
		switch u := err.(type) { //nolint:errorlint // the chain itself is walked
		case interface{ Unwrap() error }:
			walk(u.Unwrap())
		case interface{ Unwrap() []error }:
			for _, e := range u.Unwrap() {
				walk(e)
			}
		}
	}
	walk(err)
	text, jsonErr := json.Marshal(err)
	fmt.Fprintf(&b, "%s %v\n", text, jsonErr)
	slog.New(slog.NewTextHandler(&b, nil)).Error("x", "error", err)
	return b.String()
}

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
		{"limit", kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Code: "Rejected.LimitExceeded"}, kmsclient.ClassInvalid, "Rejected.LimitExceeded"},
		{"echoed token as code", kmsdouble.FaultSpec{Kind: kmsdouble.EchoError}, kmsclient.ClassInvalid, ""},
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
				if e.Class != tc.class || e.Code != tc.code || e.Op != op || !strings.Contains(e.KeyID, kmsdouble.DefaultKeyID) {
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

// FuzzAnswer has the KMS answer anything at all: each operation ends with a safe error or a checked result.
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

// TestContextEndsCalls covers a KMS that is silent before, and slow within, its answer.
func TestContextEndsCalls(t *testing.T) {
	d, b, _ := newCanary(t)
	key, err := b.GenerateDataKey(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for _, fault := range []kmsdouble.FaultSpec{
		{Kind: kmsdouble.Hang}, {Kind: kmsdouble.Hang, Applied: true}, {Kind: kmsdouble.SlowDrip, Interval: 100 * time.Millisecond},
	} {
		d.SetFault(func(*http.Request) *kmsdouble.FaultSpec { return &fault })
		for op, call := range operations(b, key) {
			ctx, cancel := context.WithTimeout(t.Context(), 60*time.Millisecond)
			start := time.Now()
			err := call(ctx)
			cancel()
			if !errors.Is(err, context.DeadlineExceeded) || time.Since(start) > 5*time.Second {
				t.Errorf("%s, %s: %v after %v", fault.Kind, op, err, time.Since(start))
			}
			if e := asError(t, err); e.Class != kmsclient.ClassUnavailable || e.Op != op {
				t.Errorf("%s, %s: %+v", fault.Kind, op, e)
			}
			checkNoCanary(t, "error", allTexts(err))
		}
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(20*time.Millisecond, cancel)
		if _, err := b.GenerateDataKey(ctx, ""); !errors.Is(err, context.Canceled) {
			t.Errorf("%s: %v", fault.Kind, err)
		}
	}
	ended, cancel := context.WithCancel(t.Context())
	cancel()
	sent := len(d.Records())
	if _, err := b.GenerateDataKey(ended, ""); !errors.Is(err, context.Canceled) {
		t.Errorf("ended before the call: %v", err)
	}
	if len(d.Records()) != sent {
		t.Error("a request was sent for a context that had ended")
	}
}

func TestHangReleased(t *testing.T) {
	d, b, _ := newCanary(t)
	for _, applied := range []bool{false, true} {
		release := make(chan struct{})
		d.Inject("GenerateDataKey", kmsdouble.FaultSpec{Kind: kmsdouble.Hang, Applied: applied, Release: release})
		time.AfterFunc(20*time.Millisecond, func() { close(release) })
		if _, err := b.GenerateDataKey(t.Context(), ""); err != nil {
			t.Errorf("applied=%v: %v", applied, err)
		}
	}
}

func TestSlowDripArrives(t *testing.T) {
	d, b, _ := newCanary(t)
	d.Inject("Encrypt", kmsdouble.FaultSpec{Kind: kmsdouble.SlowDrip, Interval: time.Microsecond})
	if _, err := b.Encrypt(t.Context(), "", []byte("x")); err != nil {
		t.Error(err)
	}
}

// TestStaleConnection has the double close a connection when its second request arrives, as a load balancer does that timed it
// out: one new request, with a new nonce, must do.
func TestStaleConnection(t *testing.T) {
	d, b, _ := newCanary(t)
	for op, call := range operations(b, mustDataKey(t, b)) {
		before := len(d.Records())
		d.Inject("", kmsdouble.FaultSpec{Kind: kmsdouble.Cut, Reused: true})
		if err := call(t.Context()); err != nil {
			t.Errorf("%s: %v", op, err)
		}
		if got := len(d.Records()) - before; got != 2 {
			t.Errorf("%s: %d requests, want 2", op, got)
		}
	}
	// A connection cut each time is no stale one: no further attempt.
	before := len(d.Records())
	d.SetFault(func(*http.Request) *kmsdouble.FaultSpec { return &kmsdouble.FaultSpec{Kind: kmsdouble.Cut} })
	if _, err := b.GenerateDataKey(t.Context(), ""); err == nil {
		t.Error("no error")
	}
	if got := len(d.Records()) - before; got != 2 {
		t.Errorf("%d requests, want 2", got)
	}
}

func mustDataKey(t *testing.T, b *Backend) *kmsclient.DataKey {
	t.Helper()
	key, err := b.GenerateDataKey(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// TestNoAnswerAtAll covers what goes wrong before the KMS is reached.
func TestNoAnswerAtAll(t *testing.T) {
	d, _, _ := newCanary(t)
	other := kmsdouble.New(t, kmsdouble.Config{})
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed := listener.Addr().String()
	_ = listener.Close()
	_, port, _ := net.SplitHostPort(d.Endpoint())
	for name, tc := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"nobody listens":      {func(c *Config) { c.Endpoint = closed }, "cannot be connected to"},
		"name not resolved":   {func(c *Config) { c.Endpoint = "kms.invalid" }, ""},
		"unknown authority":   {func(c *Config) { c.CAFile = other.CAFile() }, "unknown authority (see caFile)"},
		"system roots only":   {func(c *Config) { c.CAFile = "" }, "unknown authority (see caFile)"},
		"certificate's names": {func(c *Config) { c.Endpoint = "127.0.0.2:" + port }, ""},
	} {
		t.Run(name, func(t *testing.T) {
			b := newBackend(t, d, func(c *Config) {
				t.Setenv("ALIBABA_CLOUD_SECURITY_TOKEN", canaryToken)
				c.Credentials.Type = STS
				tc.change(c)
			})
			_, err := b.Encrypt(t.Context(), "", []byte(canaryPlaintext))
			e := asError(t, err)
			if e.Class != kmsclient.ClassUnavailable || !strings.Contains(e.Detail, tc.want) || e.HTTPStatus != 0 {
				t.Errorf("%+v", e)
			}
			checkNoCanary(t, "error", allTexts(err))
		})
	}
}

// TestPlainHTTPServer checks that a server without TLS gets no request.
func TestPlainHTTPServer(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	got := make(chan []byte, 1)
	go func() {
		conn, err := listener.Accept()
		if err != nil {
			close(got)
			return
		}
		_ = conn.SetReadDeadline(time.Now().Add(300 * time.Millisecond))
		text, _ := io.ReadAll(conn)
		_ = conn.Close()
		got <- text
	}()
	d := kmsdouble.New(t, kmsdouble.Config{})
	b := newBackend(t, d, func(c *Config) { c.Endpoint = listener.Addr().String() })
	_, err = b.Encrypt(t.Context(), "", []byte(canaryPlaintext))
	if e := asError(t, err); e.Class != kmsclient.ClassUnavailable {
		t.Errorf("%+v", e)
	}
	_ = listener.Close()
	if text := <-got; bytes.Contains(text, []byte("POST")) || bytes.Contains(text, []byte("Action")) {
		t.Errorf("a plaintext request was sent: %q", text)
	}
}

// TestBrokenProxyEnvironment has a NO_PROXY that the SDK could not use.
func TestBrokenProxyEnvironment(t *testing.T) {
	t.Setenv("NO_PROXY", "[::1,127.0.0.1,(")
	_, b := newPair(t)
	if _, err := b.GenerateDataKey(t.Context(), ""); err != nil {
		t.Error(err)
	}
}

// TestOtherHostsAreRefused checks the transport's own guard.
func TestOtherHostsAreRefused(t *testing.T) {
	for _, address := range []string{"http://kms.example.com/", "https://sts.example.com/", "https://kms.example.com:444/"} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, address, strings.NewReader("x"))
		if err != nil {
			t.Fatal(err)
		}
		tr := &callTransport{ctx: t.Context(), base: http.DefaultTransport, host: "kms.example.com"}
		if resp, err := tr.RoundTrip(req); !errors.Is(err, errForeign) {
			if err == nil {
				_ = resp.Body.Close()
			}
			t.Errorf("%s: %v", address, err)
		}
	}
}

// TestConcurrentUse is for the race detector: the SDK's clients race as soon as two goroutines share one.
func TestConcurrentUse(t *testing.T) {
	d, b, _ := newCanary(t)
	key := mustDataKey(t, b)
	d.SetFault(func(r *http.Request) *kmsdouble.FaultSpec {
		if strings.Contains(r.URL.RawQuery, "Nonce=0") { // one in sixteen
			return &kmsdouble.FaultSpec{Kind: kmsdouble.ServerError}
		}
		return nil
	})
	var wg sync.WaitGroup
	for range 24 {
		wg.Go(func() {
			for range 5 {
				for op, call := range operations(b, key) {
					var e *kmsclient.Error
					if err := call(t.Context()); err != nil && (!errors.As(err, &e) || e.HTTPStatus != 503) {
						t.Errorf("%s: %v", op, err)
					}
				}
			}
		})
	}
	wg.Wait()
}

// TestCredentialNeverPrints covers every verb that could reach a log.
func TestCredentialNeverPrints(t *testing.T) {
	c := credential{id: canaryID, secret: canarySecret, token: canaryToken}
	var b bytes.Buffer
	slog.New(slog.NewJSONHandler(&b, nil)).Info("x", "credential", c, "group", slog.GroupValue(slog.Any("c", c)))
	for _, verb := range []string{"%v", "%+v", "%#v", "%s", "%q", "%x", "%d"} {
		fmt.Fprintf(&b, verb+"\n", c)
		fmt.Fprintf(&b, verb+"\n", []any{c, &c, map[string]any{"c": c}})
	}
	checkNoCanary(t, "text", b.String())
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

// TestFIPSOnly runs this test again in a process where the SDK would panic.
func TestFIPSOnly(t *testing.T) {
	if os.Getenv("ALIBABA_TEST_FIPS") == "1" {
		_, err := New(Config{Region: "cn-hangzhou", KeyID: "key-1"})
		if err == nil || !strings.Contains(err.Error(), "fips140=only") {
			t.Fatalf("got %v", err)
		}
		return
	}
	runAgain(t, "ALIBABA_TEST_FIPS=1", "GODEBUG=fips140=only")
}

// TestFIPSOn runs a round trip in a process that uses the validated module without enforcing it.
func TestFIPSOn(t *testing.T) {
	if os.Getenv("ALIBABA_TEST_FIPS") == "1" {
		_, b := newPair(t)
		mustDataKey(t, b)
		return
	}
	runAgain(t, "ALIBABA_TEST_FIPS=1", "GODEBUG=fips140=on")
}

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	replaceFile(t, path, text)
	return path
}

// replaceFile puts a file in place by renaming, as an operator should.
func replaceFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}
