package cli

import (
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
)

// denying refuses some operations, as a policy does that does not name them.
func denying(actions ...string) func(*http.Request) *kmsdouble.FaultSpec {
	return func(r *http.Request) *kmsdouble.FaultSpec {
		if !slices.Contains(actions, r.URL.Query().Get("Action")) {
			return nil
		}
		return &kmsdouble.FaultSpec{Kind: kmsdouble.ErrorCode, Status: http.StatusForbidden, Code: "Forbidden.NoPermission"}
	}
}

// TestKMSCheckUses: a key is tried at what the rules need of it, and at nothing else: what is
// denied shows where it matters and only there.
func TestKMSCheckUses(t *testing.T) {
	double, d := clitest.NewDouble(t, kmsdouble.Config{}), clitest.NewDir(t)
	const (
		writes  = "- {prefix: /a/, writeWith: dev, recovery: [other]}\n"
		reads   = "- {prefix: /a/, writeWith: other, readWith: [dev]}\n"
		recover = "- {prefix: /a/, writeWith: other, recovery: [dev]}\n"
		both    = "- {prefix: /a/, writeWith: dev, recovery: [other]}\n- {prefix: /b/, writeWith: other, recovery: [dev]}\n"
		unused  = "- {prefix: /a/, writeWith: other}\n"
	)
	for name, tc := range map[string]struct {
		rules, denied, finding string
		tried                  []string
	}{
		"writes":                         {writes, "Encrypt", "", []string{"generate", "decrypt"}},
		"writes, without the permission": {writes, "GenerateDataKey", "generate a DEK seed: the KMS denies access (GenerateDataKey, code ", []string{"generate"}},
		"writes, cannot be read":         {writes, "Decrypt", "unwrap the DEK seed: the KMS denies access (Decrypt, code ", []string{"generate", "decrypt"}},
		"recovery":                       {recover, "GenerateDataKey", "", []string{"encrypt", "decrypt"}},
		"recovery, cannot wrap":          {recover, "Encrypt", "wrap a recovery copy: ", []string{"encrypt"}},
		"recovery, cannot unwrap":        {recover, "Decrypt", "unwrap the recovery copy: ", []string{"encrypt", "decrypt"}},
		"reads":                          {reads, "GenerateDataKey Encrypt", "", []string{}},
		"both":                           {both, "", "", []string{"generate", "decrypt", "encrypt"}},
		"both, cannot wrap":              {both, "Encrypt", "wrap a recovery copy: ", []string{"generate", "decrypt", "encrypt"}},
		"in no rule":                     {unused, "Encrypt", "", []string{"generate", "decrypt"}},
	} {
		t.Run(name, func(t *testing.T) {
			double.SetFault(denying(strings.Fields(tc.denied)...))
			path := d.Config(t, append(d.OnAlibaba(t, double, clitest.FileCredentials), "rules:\n- prefix: /registry/secrets/\n  writeWith: dev\n",
				"- name: other\n  local: {keyFile: key.yaml}\nrules:\n"+tc.rules)...)
			code := 0
			if tc.finding != "" {
				code = 1
			}
			r := execute(t, "kms", "check", "--config", path, "--output", "json")
			r.want(t, code)
			var report struct {
				KMS []providerReport `json:"kms"`
			}
			if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || len(report.KMS) != 2 {
				t.Fatalf("%v: %s", err, r.stdout)
			}
			dev := report.KMS[0]
			if !slices.Equal(dev.Tried, tc.tried) || dev.OK != (tc.finding == "") || !strings.HasPrefix(fmt.Sprint(dev.Findings), "["+tc.finding) {
				t.Errorf("tried %q, found %q; want %q and %q", dev.Tried, dev.Findings, tc.tried, tc.finding)
			}
			text := execute(t, "kms", "check", "--config", path).stdout
			if got := strings.Contains(text, "its state only"); got != (len(tc.tried) == 0) {
				t.Errorf("the text:\n%s", text)
			}
		})
	}
}

// TestUses: a rule without a recovery key counts for the provider that it writes with.
func TestUses(t *testing.T) {
	c := &config.Config{Rules: []config.Rule{{WriteWith: "a", Recovery: []string{"b"}}, {WriteWith: "b", ReadWith: []string{"a", "c"}}}}
	for name, want := range map[string]uses{
		"a": {encrypts: true, recovered: true}, "b": {encrypts: true, copies: true}, "c": {recovered: true}, "d": {encrypts: true, recovered: true},
	} {
		if got := usesOf(c, config.KMS{Name: name}); got != want {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}
	if u := usesOf(c, config.KMS{Name: "b", Local: &config.Local{}}); !u.recovered {
		t.Error("a key file is its own backup's business")
	}
}
