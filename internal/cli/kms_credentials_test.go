package cli

import (
	"context"
	"encoding/json"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/provider"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/alibaba"
)

const (
	oidcToken  = "eyJhbGciOiJSUzI1NiJ9.kms-check-canary.kms-check-canary"
	baseSecret = "kms-check-canary-base-secret"
	baseToken  = "CAIS-kms-check-canary-base-token"
)

// credentialWorld is a KMS that knows an access key and the sessions of an STS and of an instance.
type credentialWorld struct {
	kms      *kmsdouble.Double
	sts      *kmsdouble.STS
	metadata *kmsdouble.Metadata
	dir      clitest.Dir
}

func newCredentialWorld(t *testing.T) *credentialWorld {
	t.Helper()
	base := []kmsdouble.AccessKey{{ID: "STS.base", Secret: baseSecret, Token: baseToken}, {ID: "LTAIbase", Secret: baseSecret}}
	w := &credentialWorld{kms: clitest.NewDouble(t, kmsdouble.Config{AccessKeys: base}), dir: clitest.NewDir(t)}
	w.sts = kmsdouble.NewSTS(t, kmsdouble.STSConfig{AccessKeys: base, Register: w.kms.SetAccessKey})
	w.sts.SetOIDCToken(oidcToken, time.Now().Add(time.Hour))
	w.metadata = kmsdouble.NewMetadata(t, kmsdouble.MetadataConfig{Register: w.kms.SetAccessKey})
	for name, text := range map[string]string{
		"sts-id": "STS.base", "id": "LTAIbase", "secret": baseSecret, "sts-token": baseToken, "oidc": oidcToken,
	} {
		if err := os.WriteFile(w.dir.Path(name), []byte(text+"\n"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return w
}

// config writes a configuration with the credentials.
func (w *credentialWorld) config(t *testing.T, credentials string) string {
	t.Helper()
	return w.dir.Config(t, append(clitest.WithRecovery(), "local: {keyFile: key.yaml}", `alibaba:
    region: `+w.kms.Region()+`
    keyID: `+kmsdouble.DefaultAlias+`
    endpoint: `+w.kms.Endpoint()+`
    caFile: `+w.kms.CAFile()+`
    credentials: `+strings.NewReplacer("STS", "stsEndpoint: '"+w.sts.Endpoint()+"', stsCAFile: "+w.sts.CAFile(), "ROLE", "'"+kmsdouble.DefaultRoleARN+"'").Replace(credentials))...)
}

// checkSecrets fails if a text holds what only the doubles and the proxy may know.
func (w *credentialWorld) checkSecrets(t *testing.T, text string) {
	t.Helper()
	for _, s := range []kmsdouble.AccessKey{w.sts.LastSession(), w.metadata.LastSession(), {Secret: baseSecret, Token: baseToken}, {Secret: oidcToken}} {
		for _, part := range []string{s.Secret, s.Token} {
			if part != "" && strings.Contains(text, part) {
				t.Errorf("the report holds a secret: %s", text)
			}
		}
	}
}

// TestKMSCheckCredentials runs the command with each type of credentials that can be had away from
// an ECS instance, and once more after they were taken away.
func TestKMSCheckCredentials(t *testing.T) {
	for name, tc := range map[string]struct {
		credentials string
		env         map[string]string
		session     bool
		revoke      func(*credentialWorld)
		finding     string
	}{
		"accessKey": {
			credentials: "{accessKeyIDFile: id, accessKeySecretFile: secret}",
			revoke:      func(w *credentialWorld) { w.kms.RemoveAccessKey("LTAIbase") }, finding: "the access key is not known",
		},
		"sts": {
			credentials: "{type: sts, accessKeyIDFile: sts-id, accessKeySecretFile: secret, securityTokenFile: sts-token}",
			revoke: func(w *credentialWorld) {
				w.kms.SetAccessKey(kmsdouble.AccessKey{ID: "STS.base", Secret: baseSecret, Token: baseToken, Expires: time.Unix(1, 0)})
			}, finding: "the security token is missing, wrong or expired",
		},
		"assumeRole": {
			credentials: "{type: assumeRole, accessKeyIDFile: id, accessKeySecretFile: secret, roleARN: ROLE, STS}", session: true,
			revoke: func(w *credentialWorld) { w.sts.RemoveRole(kmsdouble.DefaultRoleARN) }, finding: "there is no such role",
		},
		"assumeRole, sts": {
			credentials: "{type: assumeRole, base: sts, accessKeyIDFile: sts-id, accessKeySecretFile: secret, securityTokenFile: sts-token, roleARN: ROLE, duration: 30m, STS}",
			session:     true,
			revoke:      func(w *credentialWorld) { w.sts.RemoveAccessKey("STS.base") }, finding: "the access key is not known",
		},
		"oidc": {
			credentials: "{type: oidc, roleARN: ROLE, oidcProviderARN: '" + kmsdouble.DefaultProviderARN + "', oidcTokenFile: oidc, STS}", session: true,
			revoke: func(w *credentialWorld) { w.sts.SetOIDCToken(oidcToken, time.Unix(1, 0)) }, finding: "the OIDC token was refused",
		},
		"oidc, from a pod's environment": {
			credentials: "{type: oidc, STS}", session: true,
			env: map[string]string{"ALIBABA_CLOUD_ROLE_ARN": kmsdouble.DefaultRoleARN, "ALIBABA_CLOUD_OIDC_PROVIDER_ARN": kmsdouble.DefaultProviderARN, "ALIBABA_CLOUD_OIDC_TOKEN_FILE": "oidc"},
			revoke: func(w *credentialWorld) {
				w.sts.SetFault(func(*http.Request) *kmsdouble.FaultSpec { return &kmsdouble.FaultSpec{Kind: kmsdouble.Cut} })
			}, finding: "failed before a complete answer",
		},
	} {
		t.Run(name, func(t *testing.T) {
			w := newCredentialWorld(t)
			for variable, value := range tc.env {
				if strings.HasSuffix(variable, "_FILE") {
					value = w.dir.Path(value)
				}
				t.Setenv(variable, value)
			}
			path := w.config(t, tc.credentials)
			execute(t, "config", "check", "--config", path).want(t, 0)
			check := func(code int) (providerReport, string) {
				t.Helper()
				r := execute(t, "kms", "check", "--config", path, "--timeout", "10s", "--output", "json")
				r.want(t, code)
				w.checkSecrets(t, r.stdout+r.stderr)
				var report struct {
					KMS []providerReport `json:"kms"`
				}
				if err := json.Unmarshal([]byte(r.stdout), &report); err != nil || len(report.KMS) != 2 {
					t.Fatalf("%v: %s", err, r.stdout)
				}
				return report.KMS[0], r.stdout
			}
			if r, text := check(0); (!r.CredentialsExpire.IsZero()) != tc.session || tc.session && time.Until(r.CredentialsExpire) < 25*time.Minute {
				t.Errorf("a session: %t, but %s", tc.session, text)
			}
			execute(t, "kms", "check", "--config", path).want(t, 0)
			tc.revoke(w)
			if _, text := check(1); !strings.Contains(text, tc.finding) {
				t.Errorf("after they were taken away: %s", text)
			}
		})
	}
}

// TestKMSCheckInstanceRole does the same for the role of an instance, but for the metadata server's
// address, which is no field.
func TestKMSCheckInstanceRole(t *testing.T) {
	w := newCredentialWorld(t)
	c, err := config.Load(w.config(t, "{type: ecsRAMRole}"))
	if err != nil {
		t.Fatal(err)
	}
	check := func() (providerReport, string) {
		t.Helper()
		k := c.KMS[0].Alibaba
		b, err := alibaba.New(alibaba.Config{
			Region: k.Region, KeyID: k.KeyID, Endpoint: k.Endpoint, CAFile: k.CAFile,
			Credentials: alibaba.Credentials{Type: alibaba.ECSRAMRole, MetadataURL: w.metadata.URL(), MetadataCAFile: w.metadata.CAFile()},
		})
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		p := &provider.Provider{Kind: "alibaba", Service: b}
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		r := checkBackend(ctx, "main", p, uses{encrypts: true, recovered: true}, func(kmsclient.Call) {})
		text := strings.Join(r.Findings, "\n")
		w.checkSecrets(t, text)
		return r, text
	}
	if r, text := check(); !r.OK || r.CredentialsExpire.IsZero() || time.Until(r.CredentialsExpire) < 5*time.Hour {
		t.Errorf("%+v\n%s", r, text)
	}
	w.metadata.SetRole("-")
	if r, text := check(); r.OK || !strings.Contains(text, "the instance has no RAM role") {
		t.Errorf("%+v\n%s", r, text)
	}
}

// TestKMSCheckPolicy prints a policy without a call, but for the alias of a key.
func TestKMSCheckPolicy(t *testing.T) {
	w := newCredentialWorld(t)
	print := func(code int, keyID string) (*alibaba.RAMPolicy, string) {
		t.Helper()
		text, err := os.ReadFile(w.config(t, "{accessKeyIDFile: id, accessKeySecretFile: secret}"))
		if err != nil {
			t.Fatal(err)
		}
		path := w.dir.Path("policy.yaml")
		if err := os.WriteFile(path, []byte(strings.Replace(string(text), kmsdouble.DefaultAlias, keyID, 1)), 0o600); err != nil {
			t.Fatal(err)
		}
		r := execute(t, "kms", "check", "--policy", "--config", path)
		r.want(t, code)
		var p *alibaba.RAMPolicy
		if code == 0 {
			if err := json.Unmarshal([]byte(r.stdout), &p); err != nil {
				t.Fatalf("%v: %s", err, r.stdout)
			}
		}
		return p, r.stderr
	}
	want := func(resource string) *alibaba.RAMPolicy {
		return &alibaba.RAMPolicy{Version: "1", Statement: []alibaba.RAMStatement{{
			Effect: "Allow", Resource: []string{resource}, Action: []string{"kms:DescribeKey", "kms:GenerateDataKey", "kms:Encrypt", "kms:Decrypt"},
		}}}
	}
	for keyID, resource := range map[string]string{
		"key-1": "acs:kms:cn-hangzhou:*:key/key-1",
		"acs:kms:cn-hangzhou:154035569884:key/key-1": "acs:kms:cn-hangzhou:154035569884:key/key-1",
	} {
		p, _ := print(0, keyID)
		if diff := cmp.Diff(want(resource), p); diff != "" || len(w.kms.Records()) > 0 {
			t.Errorf("%s: %d calls (-want +got):\n%s", keyID, len(w.kms.Records()), diff)
		}
	}
	p, _ := print(0, kmsdouble.DefaultAlias)
	if diff := cmp.Diff(want("acs:kms:cn-hangzhou:*:key/"+kmsdouble.DefaultKeyID), p); diff != "" || w.kms.Calls("DescribeKey") != 1 {
		t.Errorf("%s: %d calls (-want +got):\n%s", kmsdouble.DefaultAlias, len(w.kms.Records()), diff)
	}
	if _, text := print(3, "alias/none"); !strings.Contains(text, "the alias leads to no key") || !strings.Contains(text, "instead of the alias") {
		t.Errorf("an alias of nothing: %s", text)
	}
	r := execute(t, "kms", "check", "--policy", "--config", clitest.NewDir(t).Config(t))
	r.want(t, 3)
	if !strings.Contains(r.stderr, "no key of Alibaba Cloud") {
		t.Error(r.stderr)
	}
}

// TestKMSCheckDefaultKey says why the KMS refuses the default key of a cloud product, in its own
// words.
func TestKMSCheckDefaultKey(t *testing.T) {
	w := newCredentialWorld(t)
	if err := w.kms.AddKey(kmsdouble.KeyConfig{ID: "key-default", Alias: kmsdouble.DefaultAlias, Default: true}); err != nil {
		t.Fatal(err)
	}
	r := execute(t, "kms", "check", "--config", w.config(t, "{accessKeyIDFile: id, accessKeySecretFile: secret}"))
	r.want(t, 1)
	for _, want := range []string{"This operation for key-default is forbidden by permission system.", `created by "Ecs" and not by an account`} {
		if !strings.Contains(r.stdout, want) {
			t.Errorf("%s does not say %q", r.stdout, want)
		}
	}
}
