package local

import (
	"bytes"
	"encoding/base64"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// TestLife makes a file, wraps, adds a version, wraps with it, and unwraps with both.
func TestLife(t *testing.T) {
	path := filepath.Join(t.TempDir(), "key.yaml")
	if err := NewKeyFile(path); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if err := NewKeyFile(path); !errors.Is(err, fs.ErrExist) {
		t.Errorf("replaced a file: %v", err)
	}
	k, err := New(Config{KeyFile: path})
	if err != nil {
		t.Fatal(err)
	}
	seed := bytes.Repeat([]byte{7}, 32)
	first, err := k.Encrypt(t.Context(), "", seed)
	if err != nil || first.KeyID != "1" {
		t.Fatalf("%v, %v", first, err)
	}
	if err := AddVersion(path); err != nil {
		t.Fatal(err)
	}
	if s, err := k.Status(t.Context()); err != nil || s.KeyID != "2" {
		t.Errorf("status after adding a version: %v, %v", s, err)
	}
	second, err := k.Encrypt(t.Context(), "", seed)
	if err != nil || second.KeyID != "2" {
		t.Fatalf("%v, %v", second, err)
	}
	for _, w := range []*service.EncryptResponse{first, second} {
		got, err := k.Decrypt(t.Context(), "", &service.DecryptRequest{Ciphertext: w.Ciphertext, KeyID: w.KeyID})
		if err != nil || !bytes.Equal(got, seed) {
			t.Errorf("key %s: %v", w.KeyID, err)
		}
		for i := range w.Ciphertext {
			bad := bytes.Clone(w.Ciphertext)
			bad[i] ^= 1
			if _, err := k.Decrypt(t.Context(), "", &service.DecryptRequest{Ciphertext: bad, KeyID: w.KeyID}); kmsclient.ReasonOf(err) != kmsclient.Invalid {
				t.Fatalf("byte %d altered: %v", i, err)
			}
			if _, err := k.Decrypt(t.Context(), "", &service.DecryptRequest{Ciphertext: w.Ciphertext[:i], KeyID: w.KeyID}); kmsclient.ReasonOf(err) != kmsclient.Invalid {
				t.Fatalf("cut at %d: %v", i, err)
			}
		}
	}
	if _, err := k.Decrypt(t.Context(), "", &service.DecryptRequest{Ciphertext: first.Ciphertext, KeyID: "2"}); kmsclient.ReasonOf(err) != kmsclient.Invalid {
		t.Errorf("the other version: %v", err)
	}
	if _, err := k.Decrypt(t.Context(), "", &service.DecryptRequest{Ciphertext: first.Ciphertext, KeyID: "9"}); kmsclient.ReasonOf(err) != kmsclient.KeyGone {
		t.Errorf("a version that is gone: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := k.Status(t.Context()); kmsclient.ReasonOf(err) != kmsclient.Unreachable {
		t.Errorf("without the file: %v", err)
	}
}

// TestBadFiles names what is wrong with a key file, and never its secrets.
func TestBadFiles(t *testing.T) {
	const canary = "Q2FuYXJ5Q2FuYXJ5Q2FuYXJ5Q2FuYXJ5Q2FuYXJ5Q2E9"
	ok := base64.StdEncoding.EncodeToString(bytes.Repeat([]byte{1}, 32))
	for name, c := range map[string]struct {
		text, want string
		mode       fs.FileMode
	}{
		"readable by all":   {"keys: [{id: a, secret: " + ok + "}]", "chmod 600", 0o644},
		"writable by group": {"keys: [{id: a, secret: " + ok + "}]", "chmod 600", 0o660},
		"empty":             {"", "not of the form", 0o600},
		"no keys":           {"keys: []", "no keys", 0o600},
		"unknown field":     {"keys: []\nmore: " + canary, "not of the form", 0o600},
		"field of a key":    {"keys: [{id: a, secert: " + canary + "}]", "keys[0], line 1: has a field other", 0o600},
		"same id":           {"keys:\n- {id: a, secret: " + ok + "}\n- {id: a, secret: " + ok + "}", "keys[1], line 3: the id \"a\" is used twice", 0o600},
		"not base64":        {"keys: [{id: a, secret: \"%" + canary + "\"}]", "not base64", 0o600},
		"wrong length":      {"keys: [{id: a, secret: " + canary + "}]", "33 bytes instead of 32", 0o600},
		"no id":             {"keys: [{secret: " + ok + "}]", "has no id", 0o600},
		"two problems":      {"keys:\n- {id: a}\n- {secret: " + ok + "}", "0 bytes instead of 32; keys[1]", 0o600},
		"two documents":     {"keys: [{id: a, secret: " + ok + "}]\n---\nkeys: []", "more than one", 0o600},
		"not YAML":          {canary + ": [", "not of the form", 0o600},
	} {
		path := filepath.Join(t.TempDir(), "key.yaml")
		// whatever the umask is
		if err := errors.Join(os.WriteFile(path, []byte(c.text), 0o600), os.Chmod(path, c.mode)); err != nil {
			t.Fatal(err)
		}
		_, err := New(Config{KeyFile: path})
		if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), canary) {
			t.Errorf("%s: got %v, want %q", name, err, c.want)
		}
	}
	trailing := filepath.Join(t.TempDir(), "key.yaml")
	if err := os.WriteFile(trailing, []byte("---\nkeys: [{id: a, secret: "+ok+"}]\n---\n# an empty document\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := New(Config{KeyFile: trailing}); err != nil {
		t.Errorf("a trailing document: %v", err)
	}
	if _, err := New(Config{KeyFile: filepath.Join(t.TempDir(), "gone")}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a missing file: %v", err)
	}
}

// TestAddVersionThroughLink: the file behind a link gets the version, and keeps its owner.
func TestAddVersionThroughLink(t *testing.T) {
	dir := t.TempDir()
	path, link := filepath.Join(dir, "key.yaml"), filepath.Join(dir, "link.yaml")
	if err := NewKeyFile(path); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("key.yaml", link); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o400); err != nil {
		t.Fatal(err)
	}
	const other = 12345
	asRoot := os.Getuid() == 0
	if asRoot { // only root can give files away
		if err := os.Chown(path, other, other); err != nil {
			t.Fatal(err)
		}
	}
	if err := AddVersion(link); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Lstat(link); err != nil || info.Mode()&fs.ModeSymlink == 0 {
		t.Errorf("the link is gone: %v, %v", info.Mode(), err)
	}
	k, err := New(Config{KeyFile: path})
	if err != nil {
		t.Fatal(err)
	}
	if s, err := k.Status(t.Context()); err != nil || s.KeyID != "2" {
		t.Errorf("status: %v, %v", s, err)
	}
	info, err := os.Stat(path)
	if err != nil || info.Mode().Perm() != 0o400 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if owner := info.Sys().(*syscall.Stat_t).Uid; asRoot && owner != other {
		t.Errorf("the file belongs to user %d now", owner)
	}
}
