package cli

import (
	"bytes"
	"encoding/base64"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
)

// encryption writes an EncryptionConfiguration whose Secrets have these providers. KEY stands for a
// secret that nothing may print.
func encryptionConfiguration(t *testing.T, d clitest.Dir, providers string) string {
	t.Helper()
	secret := []byte("from-kubernetes-canary-32-bytes!")
	clitest.Told.Secret("a key of an EncryptionConfiguration", secret)
	text := "apiVersion: apiserver.config.k8s.io/v1\nkind: EncryptionConfiguration\nresources:\n- resources: [secrets]\n  providers: [" + providers + "]\n"
	path := d.Path("encryption.yaml")
	if err := os.WriteFile(path, []byte(strings.ReplaceAll(text, "KEY", base64.StdEncoding.EncodeToString(secret))), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

const (
	kubernetesKMS = "{kms: {apiVersion: v2, name: acme, endpoint: unix:///run/kms.sock}}"
	kubernetesCBC = "{aescbc: {keys: [{name: key1, secret: KEY}]}}"
)

// TestFromKubernetes: what is printed passes config check as it is, and keys are in files for their
// owner alone.
func TestFromKubernetes(t *testing.T) {
	d := clitest.NewDir(t)
	file := encryptionConfiguration(t, d, kubernetesKMS+","+kubernetesCBC+",{identity: {}}")
	if err := os.Mkdir(d.Path("keys"), 0o700); err != nil {
		t.Fatal(err)
	}
	r := execute(t, "config", "from-kubernetes", file, "--key-dir", d.Path("keys"))
	if r.code != 0 || r.stderr != "" {
		t.Fatalf("%+v", r)
	}
	path := d.Path("printed.yaml")
	if err := os.WriteFile(path, []byte(r.stdout), 0o600); err != nil {
		t.Fatal(err)
	}
	if r := execute(t, "config", "check", "--config", path); r != (result{}) {
		t.Errorf("config check: %+v", r)
	}
	c, err := config.Load(path)
	if err != nil {
		t.Fatal(err)
	}
	key := c.KMS[1].Kubernetes.KeyFile
	if info, err := os.Stat(key); err != nil || info.Mode() != 0o600 || filepath.Dir(key) != d.Path("keys") {
		t.Errorf("key file %s: %v, %v", key, info.Mode(), err)
	}
	text, err := os.ReadFile(key)
	if err != nil || !bytes.Contains(text, []byte(`{name: "key1", secret: `+base64.StdEncoding.EncodeToString([]byte("from-kubernetes-canary-32-bytes!"))+"}")) {
		t.Errorf("%v", err)
	}

	// To a file, of an API server with another prefix; nothing that is there is written over, and
	// what was made before is taken back.
	out := d.Path("made.yaml")
	args := []string{"config", "from-kubernetes", file, "--etcd-prefix", "other", "--output", out, "--key-dir"}
	execute(t, append(args, d.Path("keys"))...).want(t, 3, "error: "+key+" exists, and is not overwritten", "hint: ")
	execute(t, append(args, d.Path("no/keys"))...).want(t, 3, "error: there is no folder "+d.Path("no/keys"), "hint: create the folder: mkdir ")
	if err := os.Mkdir(d.Path("more"), 0o700); err != nil {
		t.Fatal(err)
	}
	if r := execute(t, append(args, d.Path("more"))...); r != (result{}) {
		t.Errorf("%+v", r)
	}
	if c, err := config.Load(out); err != nil || c.Rules[0].Prefix != "/other/secrets/" {
		t.Errorf("%v", err)
	}
	if err := os.Mkdir(d.Path("third"), 0o700); err != nil {
		t.Fatal(err)
	}
	execute(t, append(args, d.Path("third"))...).want(t, 3, "error: "+out+" exists", "hint: ")
	if left, err := os.ReadDir(d.Path("third")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// TestFromKubernetesWithoutWriter: a cluster that writes with aescbc needs a KMS, which is a
// finding, also when it is named: its backend is not known.
func TestFromKubernetesWithoutWriter(t *testing.T) {
	d := clitest.NewDir(t)
	file := encryptionConfiguration(t, d, kubernetesCBC)
	execute(t, "config", "from-kubernetes", file).want(t, 2, "error: "+file+" holds keys, and --key-dir is missing", "hint: ")
	for i, c := range []struct {
		flags []string
		code  int
		texts []string
	}{
		{nil, 1, []string{`error: KMS provider "main", with which new values will be encrypted, is a placeholder`, "hint: ", "warning: the API server writes secrets with aescbc"}},
		{[]string{"--write-with", "ack"}, 1, []string{`error: KMS provider "ack", with which new values will be encrypted, is a placeholder`, "hint: replace REPLACE under kms by its backend", `with KMS provider "ack" instead`}},
	} {
		keys := d.Path(string(rune('a' + i)))
		if err := os.Mkdir(keys, 0o700); err != nil {
			t.Fatal(err)
		}
		r := execute(t, append([]string{"config", "from-kubernetes", file, "--key-dir", keys}, c.flags...)...)
		r.want(t, c.code, c.texts...)
		path := d.Path("printed.yaml")
		if err := os.WriteFile(path, []byte(r.stdout), 0o600); err != nil {
			t.Fatal(err)
		}
		execute(t, "config", "check", "--config", path).want(t, 1, `kms[0].plugin.endpoint: "unix:///run/kmsplugin/REPLACE.sock" still contains the placeholder REPLACE`, "hint: write your own endpoint")
		execute(t, "serve", "--config", path).want(t, 3, `kms[0].plugin.endpoint: "unix:///run/kmsplugin/REPLACE.sock" still contains the placeholder REPLACE`, "hint: write your own endpoint")
		if err := os.WriteFile(path, []byte(strings.ReplaceAll(r.stdout, "REPLACE.sock", "kms.sock")), 0o600); err != nil {
			t.Fatal(err)
		}
		if r := execute(t, "config", "check", "--config", path); r != (result{}) {
			t.Errorf("config check: %+v", r)
		}
	}
	execute(t, "config", "from-kubernetes", file, "--write-with", "a:b").want(t, 2, "error: --write-with: ", "colon")
}

func TestFromKubernetesProblems(t *testing.T) {
	d := clitest.NewDir(t)
	execute(t, "config", "from-kubernetes").want(t, 2, "error: ")
	execute(t, "config", "from-kubernetes", d.Path("gone.yaml")).want(t, 3, "error: read EncryptionConfiguration: ")
	file := encryptionConfiguration(t, d, "{kms: {name: acme, endpoint: unix:///run/kms.sock}}, {secretbox: {keys: [{name: key1, KEY: secret}]}}")
	r := execute(t, "config", "from-kubernetes", file, "--key-dir", string(d))
	r.want(t, 3, "error: "+file+": line 5: resources[0].providers[0].kms: KMS v1", "hint: let the API server move to a KMS v2 provider first", "providers[1].secretbox.keys[0]: has an unknown field", "hint: ")
	if r.stdout != "" {
		t.Errorf("printed %q", r.stdout)
	}
	if err := os.Truncate(file, maxEncryptionConfiguration+1); err != nil {
		t.Fatal(err)
	}
	execute(t, "config", "from-kubernetes", file).want(t, 3, "is larger than 4 MiB")
}

// TestFromKubernetesPrintFails: without its configuration, a key file is of no use and would be in
// the way of the next try.
func TestFromKubernetesPrintFails(t *testing.T) {
	d := clitest.NewDir(t)
	f := fromKubernetes{file: encryptionConfiguration(t, d, kubernetesKMS+","+kubernetesCBC), keyDir: string(d), output: "-"}
	if err := f.run(failingWriter{}, &bytes.Buffer{}); !errors.Is(err, errNoRoom) {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(d.Path("kubernetes-aescbc.yaml")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the key file: %v", err)
	}
}

var errNoRoom = errors.New("no room")

type failingWriter struct{}

func (failingWriter) Write([]byte) (int, error) { return 0, errNoRoom }
