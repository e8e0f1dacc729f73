// Package clitest has what the tests of the command line and of the server share: configurations,
// key files, and a search for secrets in everything that was printed.
package clitest

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"os"
	"regexp"
	"sync"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
)

// Telling is everything that the code under test has printed, and what it must not print.
type Telling struct {
	mu      sync.Mutex
	printed bytes.Buffer
	secrets map[string]string // what each is, by its bytes
}

// Told is the one of the test process.
var Told Telling

// Output notes printed text.
func (t *Telling) Output(texts ...[]byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, b := range texts {
		t.printed.Write(b)
	}
}

// Secret notes a secret, and what it is.
func (t *Telling) Secret(what string, secret []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.secrets == nil {
		t.secrets = make(map[string]string)
	}
	t.secrets[string(secret)] = what
}

// Write implements [io.Writer], for logs.
func (t *Telling) Write(b []byte) (int, error) {
	t.Output(b)
	return len(b), nil
}

// Error notes an error that a client would get, and returns it.
func (t *Telling) Error(err error) error {
	if err != nil {
		t.Output([]byte(err.Error()), []byte("\n"))
	}
	return err
}

// NewDouble starts a double of Alibaba Cloud KMS whose data keys, and whatever else it wraps, are
// secrets.
func NewDouble(t *testing.T, c kmsdouble.Config) *kmsdouble.Double {
	t.Helper()
	c.OnSecret = Told.Secret
	return kmsdouble.New(t, c)
}

// KeyFile adds the keys of a local key file as secrets, if it exists.
func (t *Telling) KeyFile(tb testing.TB, path string) {
	tb.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		return // a test took it away
	}
	for _, m := range regexp.MustCompile(`secret: "?([A-Za-z0-9+/]{43}=)`).FindAllSubmatch(text, -1) {
		key, err := base64.StdEncoding.DecodeString(string(m[1]))
		if err != nil {
			tb.Errorf("%s: %v", path, err)
			continue
		}
		t.Secret("a key of a key file", key)
	}
}

// Leak returns which secret was printed, or "".
func (t *Telling) Leak() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	for secret, what := range t.secrets {
		for form, b := range map[string]string{
			"in clear": secret, "in hexadecimal": hex.EncodeToString([]byte(secret)), "in base64": base64.RawStdEncoding.EncodeToString([]byte(secret))[:40],
		} {
			if bytes.Contains(t.printed.Bytes(), []byte(b)) {
				return what + " " + form
			}
		}
	}
	return ""
}
