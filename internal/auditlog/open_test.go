package auditlog

import (
	"bytes"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	overwrite(t, at("passwd"), []byte("root:x:0:0:root:/root:/bin/sh\n"))
	overwrite(t, at("open"), nil)
	if err := os.Chmod(at("open"), 0o666); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(at("passwd"), at("link")); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(at("nowhere"), at("dangling")); err != nil {
		t.Fatal(err)
	}
	plain, keyed := sample(t, 1, nil), sample(t, 1, testKey)
	held := sample(t, 1, nil)
	open(t, Config{Path: held})
	for name, tt := range map[string]struct {
		cfg  Config
		text string
	}{
		"no folder":        {Config{Path: at("no/audit")}, "no such file"},
		"a folder":         {Config{Path: dir}, "is a directory"},
		"a link":           {Config{Path: at("link")}, "symbolic link"},
		"a dangling link":  {Config{Path: at("dangling")}, "symbolic link"},
		"a device":         {Config{Path: "/dev/full"}, "not a regular file"},
		"not a log":        {Config{Path: at("passwd")}, "not an audit log"},
		"others may write": {Config{Path: at("open")}, "chmod 600"},
		"in use":           {Config{Path: held}, "another process"},
		"key appeared":     {Config{Path: plain, Key: testKey}, "no key"},
		"key gone":         {Config{Path: keyed}, "bring the key file back"},
		"other key":        {Config{Path: keyed, Key: bytes.Repeat([]byte{1}, 32)}, "bring the key file back"},
		"short key":        {Config{Path: at("new"), Key: []byte("short")}, "32 to 4096 bytes"},
		"negative":         {Config{Path: at("new"), MaxSize: -1}, "negative"},
	} {
		if l, err := Open(tt.cfg); err == nil || !strings.Contains(err.Error(), tt.text) {
			t.Errorf("%s: %v, want %q", name, err, tt.text)
			_ = l.Close()
		}
	}
	if got := read(t, at("passwd")); string(got) != "root:x:0:0:root:/root:/bin/sh\n" {
		t.Error("a file that is no log was changed")
	}
}

func TestLoadKey(t *testing.T) {
	dir := t.TempDir()
	for name, tt := range map[string]struct {
		size int
		mode os.FileMode
		text string
	}{
		"good": {32, 0o600, ""}, "read only": {64, 0o400, ""}, "short": {31, 0o600, "32 to 4096"}, "empty": {0, 0o600, "32 to 4096"},
		"long": {4097, 0o600, "32 to 4096"}, "for all": {32, 0o644, "chmod 600"},
	} {
		path := filepath.Join(dir, name)
		overwrite(t, path, make([]byte, tt.size))
		if err := os.Chmod(path, tt.mode); err != nil {
			t.Fatal(err)
		}
		key, err := LoadKey(path)
		if tt.text == "" && (err != nil || len(key) != tt.size) || tt.text != "" && (err == nil || !strings.Contains(err.Error(), tt.text)) {
			t.Errorf("%s: %d bytes, %v", name, len(key), err)
		}
	}
	for _, path := range []string{dir, filepath.Join(dir, "none")} {
		if _, err := LoadKey(path); err == nil {
			t.Errorf("%s is taken for a key", path)
		}
	}
}

// TestLoadKeyFromSystemd: a key that systemd passes may have mode 0440, which it shows where an
// access control list grants the service's user the file. Key files of providers are taken so, too.
func TestLoadKeyFromSystemd(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "audit_key")
	overwrite(t, path, make([]byte, minKey))
	if err := os.Chown(path, -1, 1); err != nil { // a group that others have
		t.Skipf("only root can give a file to another group: %v", err)
	}
	for _, tt := range []struct {
		folder string
		mode   os.FileMode
		good   bool
	}{{dir, 0o440, true}, {dir, 0o400, true}, {dir, 0o444, false}, {dir, 0o460, false}, {filepath.Dir(dir), 0o440, false}, {"", 0o440, false}} {
		t.Setenv("CREDENTIALS_DIRECTORY", tt.folder)
		if err := os.Chmod(path, tt.mode); err != nil {
			t.Fatal(err)
		}
		if _, err := LoadKey(path); (err == nil) != tt.good {
			t.Errorf("mode %04o, credentials in %q: %v", tt.mode, tt.folder, err)
		}
	}
}

// TestOlderFilesOfAnotherChain: a new chain beside them would have its own files removed in their
// stead.
func TestOlderFilesOfAnotherChain(t *testing.T) {
	path := filepath.Join(t.TempDir(), "audit.jsonl")
	l := open(t, Config{Path: path, MaxSize: 1})
	for i := range 3 {
		l.Record(call(i))
	}
	_ = l.Close()
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(Config{Path: path, Key: testKey}); err == nil || !strings.Contains(err.Error(), "audit.jsonl.000000000002: its chain has no key") {
		t.Errorf("a new chain beside the old one's files: %v", err)
	}
}
