package server

import (
	"bytes"
	"os"
	"strings"
	"testing"

	"google.golang.org/grpc/codes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

// TestKubernetesProvider: a strict rule opens what kube-apiserver's own providers stored, and says
// which key it lacks.
func TestKubernetesProvider(t *testing.T) {
	for _, v := range clitest.KubernetesValues(t) {
		d := clitest.NewDir(t)
		v.KeyFile(t, d.Path("old.yaml"), v.KeyName)
		edits := []string{
			"rules:", "- {name: old, kubernetes: {type: " + v.Type + ", keyFile: old.yaml}}\nrules:",
			"writeWith: dev", "writeWith: dev\n  readWith: [old]\n  allowPlaintextReads: false",
		}
		a, _ := newRunningIn(t, d, edits...)
		rule, s := a.keys.Rules().Sealers()[0], a.keys.Rules().ForProxy()[0].Sealer
		if got, err := s.Open(t.Context(), nil, v.EtcdKey, v.Stored); err != nil || string(got) != string(v.Plaintext) {
			t.Errorf("%s: %q, %v", v.Name, got, err)
		}
		if _, state, err := rule.Inspect(t.Context(), v.EtcdKey, v.Stored); state != keyring.Stale {
			t.Errorf("%s: %s, %v", v.Name, state, err)
		}

		// Another key: what is missing is said, and an operator can cure it.
		v.KeyFile(t, d.Path("old.yaml"), "another")
		a, _ = newRunningIn(t, d, edits...)
		_, err := a.keys.Rules().ForProxy()[0].Sealer.Open(t.Context(), nil, v.EtcdKey, v.Stored)
		if e, ok := err.(*proxy.SealError); !ok || e.Code != codes.FailedPrecondition || !strings.Contains(e.Text, d.Path("old.yaml")) { //nolint:errorlint // the very type
			t.Errorf("%s, another key: %v", v.Name, err)
		}
	}
}

// TestKubernetesKeysReload puts another key file in the place of a provider's: what the rules open
// changes with it, and a bad file leaves the keys as they are, with a line in /readyz.
func TestKubernetesKeysReload(t *testing.T) {
	v, d := clitest.KubernetesValues(t)[0], clitest.NewDir(t)
	v.KeyFile(t, d.Path("old.yaml"), "another")
	a, r := newRunningIn(t, d, "rules:", "- {name: old, kubernetes: {type: "+v.Type+", keyFile: old.yaml}}\nrules:",
		"writeWith: dev", "writeWith: dev\n  readWith: [old]\n  allowPlaintextReads: false")
	opens := func() bool {
		got, err := a.keys.Rules().Sealers()[0].Open(t.Context(), nil, v.EtcdKey, bytes.Clone(v.Stored))
		return err == nil && string(got) == string(v.Plaintext)
	}
	if opens() {
		t.Fatal("it opens with another key")
	}
	runRings(t, a)
	check := func() string { return checkOf(t, a, "key file of old") }
	v.KeyFile(t, d.Path("old.yaml"), v.KeyName)
	clitest.Eventually(t, "use of its key", opens)
	if err := os.WriteFile(d.Path("old.yaml"), []byte("keys: [{name: key1, sec"), 0o600); err != nil {
		t.Fatal(err)
	}
	clitest.Eventually(t, "report of half a file", func() bool { return strings.Contains(check(), "old.yaml") })
	r.reload("test") // of the configuration
	if !opens() {
		t.Error("half a file, or a reload of the configuration, loses the keys")
	}
	v.KeyFile(t, d.Path("old.yaml"), "another")
	clitest.Eventually(t, "end of the report", func() bool { return check() == "ok" })
	if opens() {
		t.Error("it opens with another key")
	}
}
