package main

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"os"
	"regexp"
	"sync"
	"testing"
)

// telling is everything that the commands of all tests have printed, and what they may not have printed.
type telling struct {
	mu      sync.Mutex
	printed bytes.Buffer
	secrets map[string]string // what each is, by its bytes
}

var told telling

func (t *telling) output(texts ...[]byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, b := range texts {
		t.printed.Write(b)
	}
}

func (t *telling) secret(what string, secret []byte) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.secrets == nil {
		t.secrets = make(map[string]string)
	}
	t.secrets[string(secret)] = what
}

// keyFile adds the keys of a local key file, if it is still there.
func (t *telling) keyFile(tb testing.TB, path string) {
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
		t.secret("a key of a key file", key)
	}
}

// leak says what was printed of the secrets, or returns "".
func (t *telling) leak() string {
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

// TestTelling: the search that ends this package's tests finds what it is for.
func TestTelling(t *testing.T) {
	path := newDir(t).path("key.yaml")
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var own telling
	own.keyFile(t, path)
	if len(own.secrets) != 1 {
		t.Fatalf("%d keys in a new key file", len(own.secrets))
	}
	own.output([]byte("harmless"))
	if what := own.leak(); what != "" {
		t.Errorf("found %s", what)
	}
	own.output(text)
	if own.leak() == "" {
		t.Error("a printed key file was not found")
	}
}
