package clitest

import (
	"bytes"
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/local"
)

// Deadline bounds everything that a test waits for.
const Deadline = 20 * time.Second

// Eventually polls until ok.
func Eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(Deadline); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("no %s within %v", what, Deadline)
		}
	}
}

// Dir is a folder with a key file and whatever configurations the test writes.
type Dir string

// NewDir returns a new folder with a key file.
func NewDir(t *testing.T) Dir {
	t.Helper()
	d := Dir(t.TempDir())
	NewKey(t, d.Path("key.yaml"))
	// with the versions that the test added
	t.Cleanup(func() { Told.KeyFile(t, d.Path("key.yaml")) })
	return d
}

// WithRecovery are edits of the configuration that put a recovery key beside the rule's.
func WithRecovery() []string {
	return []string{"rules:", "- name: dr\n  local: {keyFile: key.yaml}\nrules:", "writeWith: dev", "writeWith: dev\n  recovery: [dr]"}
}

// Path returns the path of a file in the folder.
func (d Dir) Path(name string) string { return filepath.Join(string(d), name) }

// Config is a file that serves on free ports and seals under the folder's key; edits replace parts
// of it, old and new in turn.
func (d Dir) Config(t *testing.T, edits ...string) string {
	t.Helper()
	text := strings.NewReplacer(edits...).Replace(`apiVersion: etcd-kms-proxy.io/v1alpha1
kind: ProxyConfiguration
listeners:
- address: 127.0.0.1:0
etcd:
  endpoints: [http://127.0.0.1:1]
kms:
- name: dev
  local: {keyFile: key.yaml}
rules:
- prefix: /registry/secrets/
  writeWith: dev
admin: {address: "127.0.0.1:0"}
log: {level: debug}
`)
	path := d.Path("config.yaml")
	// A new file in the old one's place, as careful editors and mounts do it.
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
	return path
}

// Occupy listens on a free port until the test ends.
func Occupy(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l.Addr().String()
}

// AuditKey makes a key for an audit log. It is a secret like those of key files.
func (d Dir) AuditKey(t *testing.T) {
	t.Helper()
	key := []byte("audit key, of 32 bytes or more, in the clear")
	Told.Secret("the key of an audit log", key)
	if err := os.WriteFile(d.Path("audit.key"), key, 0o600); err != nil {
		t.Fatal(err)
	}
}

// AuditLog reads the records of the folder's log, and gives its text to the search for secrets.
func (d Dir) AuditLog(t *testing.T) []map[string]any {
	t.Helper()
	return d.AuditLogAt(t, "audit.jsonl")
}

// AuditLogAt returns the records of the audit log with that name.
func (d Dir) AuditLogAt(t *testing.T, name string) (records []map[string]any) {
	t.Helper()
	text, err := os.ReadFile(d.Path(name))
	if err != nil {
		t.Fatal(err)
	}
	Told.Output(text)
	for l := range bytes.Lines(text) {
		var r map[string]any
		if err := json.Unmarshal(l, &r); err != nil {
			t.Fatalf("%v: %s", err, l)
		}
		records = append(records, r)
	}
	return records
}

// Block puts another file in the place of the log, which nobody may write to then; the result takes
// it away.
func (d Dir) Block(t *testing.T) (unblock func()) {
	t.Helper()
	return d.BlockAt(t, "audit.jsonl")
}

// BlockAt keeps the audit log with that name from being written, until unblock is called.
func (d Dir) BlockAt(t *testing.T, name string) (unblock func()) {
	t.Helper()
	// In one step: a record between two would find no file, and begin one.
	for _, step := range []error{
		os.WriteFile(d.Path("audit.other"), []byte("not an audit log\n"), 0o600),
		os.Link(d.Path(name), d.Path("audit.kept")),
		os.Rename(d.Path("audit.other"), d.Path(name)),
	} {
		if step != nil {
			t.Fatal(step)
		}
	}
	return func() {
		t.Helper()
		if err := os.Rename(d.Path("audit.kept"), d.Path(name)); err != nil {
			t.Fatal(err)
		}
	}
}

// NewKey creates a key file, or adds a version to one.
func NewKey(t *testing.T, path string) {
	t.Helper()
	err := local.NewKeyFile(path)
	if errors.Is(err, fs.ErrExist) {
		err = local.AddVersion(path)
	}
	if err != nil {
		t.Fatal(err)
	}
}
