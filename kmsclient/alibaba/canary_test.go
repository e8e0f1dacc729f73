package alibaba

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"log/slog"
	"net/url"
	"strings"
	"sync"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
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

// checkNoCanary fails if a text holds a canary, plain or encoded, or what looks like a part of a
// request.
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
