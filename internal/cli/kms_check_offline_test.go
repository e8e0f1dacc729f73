package cli

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
)

func write(t *testing.T, d clitest.Dir, name, text string) string {
	t.Helper()
	if err := os.WriteFile(d.Path(name), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return d.Path(name)
}

// TestKMSCheckOffline: an offline key is tested by wrapping, and with an identity by unwrapping.
// The audit log says when that was.
func TestKMSCheckOffline(t *testing.T) {
	d := clitest.NewDir(t)
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	other, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	mine, theirs := write(t, d, "mine.txt", key.String()+"\n"), write(t, d, "theirs.txt", other.String()+"\n")
	path := d.Config(t, "rules:\n- prefix: /registry/secrets/\n  writeWith: dev\n",
		"- name: off\n  age: {recipients: ["+key.Recipient().String()+"]}\nrules:\n- {prefix: /a/, writeWith: dev, recovery: [off]}\naudit: {path: audit.jsonl}\n")
	log := filepath.Join(filepath.Dir(path), "audit.commands.jsonl")
	for name, test := range map[string]struct {
		args    []string
		code    int
		tried   []string
		text    string
		outcome string
	}{
		"no identity":      {nil, 0, []string{"encrypt"}, "not tested with an identity", ""},
		"the identity":     {[]string{"--identity", mine}, 0, []string{"encrypt", "decrypt"}, "an identity unwrapped", `"outcome":"ok"`},
		"one of several":   {[]string{"--identity", theirs, "--identity", mine}, 0, []string{"encrypt", "decrypt"}, "an identity unwrapped", `"outcome":"ok"`},
		"another identity": {[]string{"--identity", theirs}, 1, []string{"encrypt", "decrypt"}, "made for other recipients", `"outcome":"failed"`},
	} {
		t.Run(name, func(t *testing.T) {
			_ = os.Remove(log)
			args := append([]string{"kms", "check", "--config", path}, test.args...)
			r := execute(t, append(args, "--output", "json")...)
			r.want(t, test.code)
			var report struct {
				KMS []providerReport `json:"kms"`
			}
			if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || len(report.KMS) != 2 {
				t.Fatalf("%v: %s", err, r.stdout)
			}
			off := report.KMS[1]
			if off.Backend != "age" || !slices.Equal(off.Tried, test.tried) || len(off.Recipients) != 1 || !strings.HasPrefix(off.KeyID, "age-") {
				t.Errorf("%+v", off)
			}
			if text := execute(t, args...).stdout; !strings.Contains(text, test.text) {
				t.Errorf("the text:\n%s", text)
			}
			records, _ := os.ReadFile(log)
			if got := strings.Contains(string(records), `"kms check"`); got != (test.outcome != "") || !strings.Contains(string(records), test.outcome) {
				t.Errorf("the audit log:\n%s", records)
			}
			again := execute(t, "kms", "check", "--config", path)
			if got := strings.Contains(again.stdout, "last with an identity at 20"); got != (test.code == 0 && test.args != nil) {
				t.Errorf("afterwards, without an identity:\n%s", again.stdout)
			}
		})
	}
}

// TestIdentityRefused: problems of --identity have a hint, and never show what is in the file.
func TestIdentityRefused(t *testing.T) {
	d := clitest.NewDir(t)
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	with := d.Config(t, "rules:\n", "- name: off\n  age: {recipients: ["+key.Recipient().String()+"]}\nrules:\n")
	for name, test := range map[string]struct {
		file string
		code int
		text string
	}{
		"missing":     {"/nowhere/identity.txt", 3, "no such file"},
		"recipient":   {write(t, d, "recipient", key.Recipient().String()), 3, "line 1 is a recipient, which is public"},
		"truncated":   {write(t, d, "cut", key.String()[:40]), 3, "line 1 is not an age identity"},
		"no identity": {write(t, d, "comment", "# nothing\n"), 3, "holds no identity"},
	} {
		t.Run(name, func(t *testing.T) {
			r := execute(t, "kms", "check", "--config", with, "--identity", test.file)
			r.want(t, test.code)
			if !strings.Contains(r.stderr, test.text) || !strings.Contains(r.stderr, "hint: name a file") || strings.Contains(r.stderr, key.String()[:40]) {
				t.Errorf("stderr: %s", r.stderr)
			}
		})
	}
	bare := d.Config(t)
	r := execute(t, "kms", "check", "--config", bare, "--identity", write(t, d, "id", key.String()))
	r.want(t, 2)
	if !strings.Contains(r.stderr, "no provider of kind age") {
		t.Errorf("stderr: %s", r.stderr)
	}
	r = execute(t, "reencrypt", "--watch", "--config", with, "--identity", "x")
	r.want(t, 2)
	if !strings.Contains(r.stderr, "--identity") {
		t.Errorf("stderr: %s", r.stderr)
	}
	// serve never takes one.
	execute(t, "serve", "--config", with, "--identity", "x").want(t, 2)
}
