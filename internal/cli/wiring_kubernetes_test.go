package cli

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/keyfile"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

// kubernetesValue is a value that kube-apiserver's own code stored.
type kubernetesValue struct {
	Name, Type, KeyName                string
	Secret, EtcdKey, Plaintext, Stored []byte
}

func kubernetesValues(t *testing.T) []kubernetesValue {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "crypto", "kubelegacy", "testdata", "kubernetes-vectors.json"))
	if err != nil {
		t.Fatal(err)
	}
	var vs []kubernetesValue
	if err := json.Unmarshal(b, &vs); err != nil || len(vs) == 0 {
		t.Fatal(len(vs), err)
	}
	return vs
}

// keyFile makes the file of a kubernetes provider.
func (v *kubernetesValue) keyFile(t *testing.T, path, name string) {
	t.Helper()
	form := keyfile.Form{ID: "name"}
	if err := os.WriteFile(path, []byte("keys:\n"+form.Line(keyfile.Key{ID: name, Secret: v.Secret})), 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestKubernetesProvider: a strict rule opens what kube-apiserver's own providers stored, and says which key it lacks.
func TestKubernetesProvider(t *testing.T) {
	for _, v := range kubernetesValues(t) {
		d := newDir(t)
		v.keyFile(t, d.path("old.yaml"), v.KeyName)
		edits := []string{
			"rules:", "- {name: old, kubernetes: {type: " + v.Type + ", keyFile: old.yaml}}\nrules:",
			"writeWith: dev", "writeWith: dev\n  readWith: [old]\n  allowPlaintextReads: false",
		}
		a, _ := newRunningIn(t, d, edits...)
		s := sealer{a.rules.Load().sealers[0]}
		if got, err := s.Open(t.Context(), v.EtcdKey, v.Stored); err != nil || string(got) != string(v.Plaintext) {
			t.Errorf("%s: %q, %v", v.Name, got, err)
		}
		if _, standing, err := s.Inspect(t.Context(), v.EtcdKey, v.Stored); standing != keyring.Stale {
			t.Errorf("%s: %s, %v", v.Name, standing, err)
		}

		// Another key: what is missing is said, and an operator can cure it.
		v.keyFile(t, d.path("old.yaml"), "another")
		a, _ = newRunningIn(t, d, edits...)
		_, err := sealer{a.rules.Load().sealers[0]}.Open(t.Context(), v.EtcdKey, v.Stored)
		if e, ok := err.(*proxy.SealError); !ok || e.Code != codes.FailedPrecondition || !strings.Contains(e.Text, d.path("old.yaml")) { //nolint:errorlint // the very type
			t.Errorf("%s, another key: %v", v.Name, err)
		}
	}
}

func TestKubernetesCommands(t *testing.T) {
	v, d := kubernetesValues(t)[0], newDir(t)
	v.keyFile(t, d.path("old.yaml"), "key1")
	config := d.config(t, "rules:", "- {name: old, kubernetes: {type: aescbc, keyFile: old.yaml}}\nrules:", "writeWith: dev", "writeWith: dev\n  readWith: [old]")
	if r := execute(t, "config", "check", "--config", config); r != (result{}) {
		t.Errorf("config check: %+v", r)
	}
	r := execute(t, "kms", "check", "--config", config, "--output", "json")
	var report struct{ KMS []providerReport }
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || len(report.KMS) != 2 || !report.KMS[1].OK || report.KMS[1].Backend != "kubernetes aescbc" {
		t.Errorf("kms check: %+v, %v", r, err)
	}
	execute(t, "kms", "serve-plugin", "--config", config, "--name", "old", "--socket", d.path("s.sock")).want(t, 2, `error: kms "old": is of kind kubernetes`, "hint: ")

	if err := os.Chmod(d.path("old.yaml"), 0o660); err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"config", "kms"} {
		r := execute(t, command, "check", "--config", config)
		if r.code != 1 || !strings.Contains(r.stdout+r.stderr, "chmod 600") {
			t.Errorf("%s check of a file that others may read: %+v", command, r)
		}
	}
	execute(t, "serve", "--config", config).want(t, 3, "kms[1].kubernetes.keyFile: key file ", "chmod 600")
	if err := os.WriteFile(d.path("old.yaml"), []byte("keys:\n- {name: key1, secret: QUJD}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(d.path("old.yaml"), 0o600); err != nil {
		t.Fatal(err)
	}
	execute(t, "config", "check", "--config", config).want(t, 1, "keys[0], line 2: its secret has 3 bytes instead of 16 or 24 or 32")
}

// TestKubernetesKeysReload puts another key file in the place of a provider's: what the rules open
// changes with it, and a bad file leaves the keys as they are, with a line in /readyz.
func TestKubernetesKeysReload(t *testing.T) {
	v, d := kubernetesValues(t)[0], newDir(t)
	v.keyFile(t, d.path("old.yaml"), "another")
	a, r := newRunningIn(t, d, "rules:", "- {name: old, kubernetes: {type: "+v.Type+", keyFile: old.yaml}}\nrules:",
		"writeWith: dev", "writeWith: dev\n  readWith: [old]\n  allowPlaintextReads: false")
	opens := func() bool {
		got, err := a.rules.Load().sealers[0].Open(t.Context(), v.EtcdKey, bytes.Clone(v.Stored))
		return err == nil && string(got) == string(v.Plaintext)
	}
	if opens() {
		t.Fatal("it opens with another key")
	}
	keys := a.legacy[0]
	v.keyFile(t, d.path("old.yaml"), v.KeyName)
	keys.reload(r)
	if !opens() || checkOf(t, a, "key file of old") != "ok" {
		t.Errorf("with its key: %t, %s", opens(), checkOf(t, a, "key file of old"))
	}
	if err := os.WriteFile(d.path("old.yaml"), []byte("keys: [{name: key1, sec"), 0o600); err != nil {
		t.Fatal(err)
	}
	keys.reload(r)
	if !opens() || !strings.Contains(checkOf(t, a, "key file of old"), "old.yaml") {
		t.Errorf("half a file: %t, %s", opens(), checkOf(t, a, "key file of old"))
	}
	r.reload("test") // of the configuration
	if !opens() {
		t.Error("a reload of the configuration loses the keys")
	}
	v.keyFile(t, d.path("old.yaml"), "another")
	keys.reload(r)
	if opens() || checkOf(t, a, "key file of old") != "ok" {
		t.Errorf("with another key: %t, %s", opens(), checkOf(t, a, "key file of old"))
	}
}
