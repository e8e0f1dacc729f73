package cli

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
)

// TestKMSCheckAlibaba runs the whole command against the double, through the states of a key.
func TestKMSCheckAlibaba(t *testing.T) {
	double := clitest.NewDouble(t, kmsdouble.Config{})
	d := clitest.NewDir(t)
	for name, secret := range map[string]string{"id": kmsdouble.DefaultAccessKeyID, "secret": kmsdouble.DefaultAccessKeySecret} {
		if err := os.WriteFile(d.Path(name), []byte(secret+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	config := d.Config(t, append(clitest.WithRecovery(), "local: {keyFile: key.yaml}", `alibaba:
    region: `+double.Region()+`
    keyID: `+kmsdouble.DefaultKeyID+`
    endpoint: `+double.Endpoint()+`
    caFile: `+double.CAFile()+`
    encryptionContext: {cluster: c1}
    credentials: {accessKeyIDFile: id, accessKeySecretFile: secret}`)...)
	execute(t, "config", "check", "--config", config).want(t, 0)

	check := func(code int) (providerReport, string) {
		t.Helper()
		text := execute(t, "kms", "check", "--config", config, "--timeout", "10s")
		text.want(t, code)
		r := execute(t, "kms", "check", "--config", config, "--timeout", "10s", "--output", "json")
		r.want(t, code)
		all := text.stdout + text.stderr + r.stdout + r.stderr
		if strings.Contains(all, kmsdouble.DefaultAccessKeySecret) {
			t.Error("the report holds the access key's secret")
		}
		var report struct {
			KMS []providerReport `json:"kms"`
		}
		if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || len(report.KMS) != 2 {
			t.Fatalf("%v: %s", err, r.stdout)
		}
		return report.KMS[0], all
	}
	r, text := check(0)
	if r.Key == nil || r.Key.State != "Enabled" || r.KeyID != double.PrimaryKeyID(kmsdouble.DefaultKeyID) || len(r.Warnings) != 0 {
		t.Errorf("an enabled key: %+v\n%s", r, text)
	}
	double.Unprotect(kmsdouble.DefaultKeyID)
	if r, text := check(0); !r.OK || len(r.Warnings) != 2 || !strings.Contains(text, "deletion protection is off") || !strings.Contains(text, "rotation is off") {
		t.Errorf("a key that is badly kept: %+v\n%s", r, text)
	}
	execute(t, "kms", "check", "--config", config, "--strict").want(t, 1)
	double.SetState(kmsdouble.DefaultKeyID, kmsdouble.Disabled)
	if r, text := check(1); r.Key == nil || r.Key.State != "Disabled" || !strings.Contains(text, "state: the KMS key is disabled, pending deletion or gone (Status, ") {
		t.Errorf("a disabled key: %+v\n%s", r, text)
	}
	double.SetState(kmsdouble.DefaultKeyID, kmsdouble.PendingDeletion)
	if r, text := check(1); r.Key == nil || r.Key.DeleteAt.IsZero() || !strings.Contains(text, "the key will be deleted at ") {
		t.Errorf("a key that will be deleted: %+v\n%s", r, text)
	}
	double.SetState(kmsdouble.DefaultKeyID, kmsdouble.Enabled)
	double.RemoveAccessKey(kmsdouble.DefaultAccessKeyID)
	if r, _ := check(1); len(r.Findings) == 0 || r.Key != nil {
		t.Errorf("an unknown caller: %+v", r)
	}
}
