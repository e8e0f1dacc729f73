package cli

import (
	"bytes"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"log/slog"
	"os"
	"regexp"
	"sync"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
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

// Write implements [io.Writer], for logs.
func (t *telling) Write(b []byte) (int, error) {
	t.output(b)
	return len(b), nil
}

// error notes what a client would be told, and returns it.
func (t *telling) error(err error) error {
	if err != nil {
		t.output([]byte(err.Error()), []byte("\n"))
	}
	return err
}

// newDouble starts a double of Alibaba Cloud KMS whose data keys, and whatever else it wraps, no command may show.
func newDouble(t *testing.T, c kmsdouble.Config) *kmsdouble.Double {
	t.Helper()
	c.OnSecret = told.secret
	return kmsdouble.New(t, c)
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
	for how, tell := range map[string]func(*telling, []byte){
		"an error": func(own *telling, b []byte) { _ = own.error(fmt.Errorf("seed %x is lost", b)) },
		"a log":    func(own *telling, b []byte) { slog.New(slog.NewTextHandler(own, nil)).Info("minted", "seed", b) },
	} {
		var own telling
		seed := bytes.Repeat([]byte("seed"), 8)
		own.secret("a seed", seed)
		tell(&own, []byte("another one that is no secret..."))
		if what := own.leak(); what != "" {
			t.Errorf("found %s in %s", what, how)
		}
		if tell(&own, seed); own.leak() == "" {
			t.Errorf("a seed in %s was not found", how)
		}
	}
}
