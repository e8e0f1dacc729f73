package cli

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
)

func TestKubernetesCommands(t *testing.T) {
	v, d := clitest.KubernetesValues(t)[0], clitest.NewDir(t)
	v.KeyFile(t, d.Path("old.yaml"), "key1")
	config := d.Config(t, "rules:", "- {name: old, kubernetes: {type: aescbc, keyFile: old.yaml}}\nrules:", "writeWith: dev", "writeWith: dev\n  readWith: [old]")
	if r := execute(t, "config", "check", "--config", config); r != (result{}) {
		t.Errorf("config check: %+v", r)
	}
	r := execute(t, "kms", "check", "--config", config, "--output", "json")
	var report struct{ KMS []providerReport }
	if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || len(report.KMS) != 2 || !report.KMS[1].OK || report.KMS[1].Backend != "kubernetes aescbc" {
		t.Errorf("kms check: %+v, %v", r, err)
	}
	execute(t, "kms", "serve-plugin", "--config", config, "--name", "old", "--socket", d.Path("s.sock")).want(t, 2, `error: kms "old": is of kind kubernetes`, "hint: ")

	if err := os.Chmod(d.Path("old.yaml"), 0o660); err != nil {
		t.Fatal(err)
	}
	for _, command := range []string{"config", "kms"} {
		r := execute(t, command, "check", "--config", config)
		if r.code != 1 || !strings.Contains(r.stdout+r.stderr, "chmod 600") {
			t.Errorf("%s check of a file that others may read: %+v", command, r)
		}
	}
	execute(t, "serve", "--config", config).want(t, 3, "kms[1].kubernetes.keyFile: key file ", "chmod 600")
	if err := os.WriteFile(d.Path("old.yaml"), []byte("keys:\n- {name: key1, secret: QUJD}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(d.Path("old.yaml"), 0o600); err != nil {
		t.Fatal(err)
	}
	execute(t, "config", "check", "--config", config).want(t, 1, "keys[0], line 2: its secret has 3 bytes instead of 16 or 24 or 32")
}
