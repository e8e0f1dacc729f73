package canary_test

import (
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/canary"
)

func TestEveryFormIsFound(t *testing.T) {
	set := canary.New("test")
	binary := []byte("\x00\xff\x80\x01\"\\\n seed \xfe")
	set.Add("a binary secret", binary)
	for _, secret := range [][]byte{[]byte(set.Value("hunter2")), binary, set.Key(7)} {
		for shift := range 4 {
			padded := append([]byte("abcd")[:shift:shift], secret...)
			padded = append(padded, "tail"...)
			asJSON, err := json.Marshal(map[string][]byte{"v": padded})
			if err != nil {
				t.Fatal(err)
			}
			for form, text := range map[string]string{
				"raw":     string(padded),
				"%q":      fmt.Sprintf("%q", padded),
				"%x":      fmt.Sprintf("%x", padded),
				"%X":      fmt.Sprintf("%X", padded),
				"%v":      fmt.Sprintf("%v", [...]any{padded}),
				"JSON":    string(asJSON),
				"hex":     hex.EncodeToString(padded),
				"base64":  base64.StdEncoding.EncodeToString(padded),
				"raw url": base64.RawURLEncoding.EncodeToString(padded),
			} {
				if len(set.Search("text", []byte("before "+text+" after"))) == 0 {
					t.Errorf("%d bytes, shifted by %d, as %s: not found", len(secret), shift, form)
				}
			}
		}
	}
}

func TestNothingElseIsFound(t *testing.T) {
	set, other := canary.New("one"), canary.New("another")
	set.Add("too short to be told from chance", []byte("1234567"))
	dir := t.TempDir()
	if err := os.MkdirAll(filepath.Join(dir, "a", "b"), 0o700); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "a", "b", "file")
	if err := os.WriteFile(file, []byte(other.Value("x")+" 1234567"), 0o600); err != nil {
		t.Fatal(err)
	}
	if found, err := set.Files(dir); err != nil || len(found) != 0 {
		t.Errorf("Files = %v, %v; want nothing", found, err)
	}
	found, err := other.Files(dir)
	if err != nil || len(found) != 1 || found[0].Path != file || found[0].Offset != 0 {
		t.Errorf("Files = %v, %v; want one finding in %s", found, err, file)
	}
	if _, err := set.Files(filepath.Join(dir, "missing")); err != nil {
		t.Errorf("a file that vanished: %v", err)
	}
}

func TestKeys(t *testing.T) {
	set := canary.New("keys")
	if a, b := set.Key(1), set.Key(2); len(a) != 32 || len(b) != 32 || string(a) == string(b) {
		t.Errorf("Key(1) = %q, Key(2) = %q: want two different keys of 32 bytes", a, b)
	}
}
