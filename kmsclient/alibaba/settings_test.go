package alibaba

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
)

func TestNewRefuses(t *testing.T) {
	t.Setenv("ALIBABA_CLOUD_ACCESS_KEY_ID", "id")
	t.Setenv("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "secret")
	t.Setenv("ALIBABA_CLOUD_SECURITY_TOKEN", "")
	t.Setenv("DEBUG", "")
	notPEM := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(notPEM, []byte("no certificate"), 0o600); err != nil {
		t.Fatal(err)
	}
	good := Config{Region: "cn-hangzhou", KeyID: "key-1"}
	if _, err := New(good); err != nil {
		t.Fatal(err)
	}
	for name, tc := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"no region":            {func(c *Config) { c.Region = "" }, "region"},
		"bad region":           {func(c *Config) { c.Region = "cn/hangzhou" }, "region"},
		"no key":               {func(c *Config) { c.KeyID = "" }, "keyID"},
		"key with space":       {func(c *Config) { c.KeyID = "key 1" }, "keyID"},
		"endpoint with scheme": {func(c *Config) { c.Endpoint = "https://kms.example.com" }, "without https://"},
		"plain http":           {func(c *Config) { c.Endpoint = "http://kms.example.com" }, "without https://"},
		"endpoint with path":   {func(c *Config) { c.Endpoint = "kms.example.com/x" }, "host or host:port"},
		"endpoint with user":   {func(c *Config) { c.Endpoint = "u:p@kms.example.com" }, "host or host:port"},
		"endpoint, bad port":   {func(c *Config) { c.Endpoint = "kms.example.com:x" }, "host or host:port"},
		"endpoint, no port":    {func(c *Config) { c.Endpoint = "kms.example.com:" }, "host or host:port"},
		"endpoint with query":  {func(c *Config) { c.Endpoint = "kms.example.com?x" }, "host or host:port"},
		"missing CA":           {func(c *Config) { c.CAFile = filepath.Join(t.TempDir(), "none") }, "caFile"},
		"CA without PEM":       {func(c *Config) { c.CAFile = notPEM }, "caFile"},
		"long context":         {func(c *Config) { c.EncryptionContext = map[string]string{"a": strings.Repeat("x", 8192)} }, "8192"},
		"context without key":  {func(c *Config) { c.EncryptionContext = map[string]string{"": "x"} }, "encryptionContext"},
		"ARN, other region":    {func(c *Config) { c.KeyID = "acs:kms:cn-beijing:1:key/key-1" }, `region "cn-beijing"`},
		"ARN of a secret":      {func(c *Config) { c.KeyID = "acs:kms:cn-hangzhou:1:secret/s" }, "not an ARN such as"},
		"unknown type":         {func(c *Config) { c.Credentials.Type = "magic" }, "known types: accessKey, sts, ecsRAMRole, oidc, assumeRole"},
		"role's name":          {func(c *Config) { c.Credentials = Credentials{Type: ECSRAMRole, RoleName: "../x"} }, "roleName"},
		"oidc without role":    {func(c *Config) { c.Credentials.Type = OIDC }, "ALIBABA_CLOUD_ROLE_ARN"},
		"oidc, no provider":    {func(c *Config) { c.Credentials = Credentials{Type: OIDC, RoleARN: kmsdouble.DefaultRoleARN} }, "ALIBABA_CLOUD_OIDC_PROVIDER_ARN"},
		"oidc without token": {func(c *Config) {
			c.Credentials = Credentials{Type: OIDC, RoleARN: kmsdouble.DefaultRoleARN, OIDCProviderARN: kmsdouble.DefaultProviderARN}
		}, "ALIBABA_CLOUD_OIDC_TOKEN_FILE"},
		"oidc, missing file": {func(c *Config) {
			c.Credentials = Credentials{Type: OIDC, RoleARN: kmsdouble.DefaultRoleARN, OIDCProviderARN: kmsdouble.DefaultProviderARN, OIDCTokenFile: "/none"}
		}, "read OIDC token"},
		"no role":             {func(c *Config) { c.Credentials.Type = AssumeRole }, "roleARN"},
		"role of no form":     {func(c *Config) { c.Credentials = Credentials{Type: AssumeRole, RoleARN: "acs:ram::1:user/x"} }, "roleARN"},
		"session's name":      {assumed(func(c *Credentials) { c.SessionName = "a b" }), "sessionName"},
		"short session":       {assumed(func(c *Credentials) { c.Duration = time.Minute }), "15m to 12h"},
		"long session":        {assumed(func(c *Credentials) { c.Duration = 13 * time.Hour }), "15m to 12h"},
		"policy, no JSON":     {assumed(func(c *Credentials) { c.Policy = "{" }), "policy"},
		"long policy":         {assumed(func(c *Credentials) { c.Policy = `"` + strings.Repeat("x", 2047) + `"` }), "2048"},
		"sts with scheme":     {assumed(func(c *Credentials) { c.STSEndpoint = "http://sts" }), "sts endpoint"},
		"missing CA of sts":   {assumed(func(c *Credentials) { c.STSCAFile = "/none" }), "caFile"},
		"other base":          {assumed(func(c *Credentials) { c.Base = ECSRAMRole }), "neither accessKey nor sts"},
		"base of a token":     {assumed(func(c *Credentials) { c.Base = STS }), "ALIBABA_CLOUD_SECURITY_TOKEN"},
		"needless token":      {assumed(func(c *Credentials) { c.SecurityTokenFile = notPEM }), "securityTokenFile"},
		"sts without token":   {func(c *Config) { c.Credentials.Type = STS }, "ALIBABA_CLOUD_SECURITY_TOKEN"},
		"token, not sts":      {func(c *Config) { c.Credentials.SecurityTokenFile = notPEM }, "securityTokenFile"},
		"missing secret file": {func(c *Config) { c.Credentials.AccessKeySecretFile = filepath.Join(t.TempDir(), "none") }, "access key secret"},
	} {
		t.Run(name, func(t *testing.T) {
			cfg := good
			tc.change(&cfg)
			if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %v, want an error with %q", err, tc.want)
			}
		})
	}
	t.Run("all at once", func(t *testing.T) {
		_, err := New(Config{Region: "?", Endpoint: "a b", CAFile: notPEM, Credentials: Credentials{Type: "oidc"}})
		for _, want := range []string{"region", "keyID", "endpoint", "caFile", "credentials"} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v does not mention %s", err, want)
			}
		}
	})
	t.Run("DEBUG=sdk", func(t *testing.T) {
		t.Setenv("DEBUG", "http,sdk")
		if _, err := New(good); err == nil || !strings.Contains(err.Error(), "DEBUG=sdk") {
			t.Errorf("got %v", err)
		}
	})
	t.Run("no credentials", func(t *testing.T) {
		t.Setenv("ALIBABA_CLOUD_ACCESS_KEY_ID", "")
		t.Setenv("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "  ")
		_, err := New(good)
		for _, want := range []string{"ALIBABA_CLOUD_ACCESS_KEY_ID", "ALIBABA_CLOUD_ACCESS_KEY_SECRET"} {
			if err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%v does not mention %s", err, want)
			}
		}
	})
}

// assumed changes credentials of type assumeRole that are right otherwise.
func assumed(change func(*Credentials)) func(*Config) {
	return func(c *Config) {
		c.Credentials = Credentials{Type: AssumeRole, RoleARN: kmsdouble.DefaultRoleARN}
		change(&c.Credentials)
	}
}

func TestDefaultEndpoint(t *testing.T) {
	t.Setenv("ALIBABA_CLOUD_ACCESS_KEY_ID", "id")
	t.Setenv("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "secret")
	b, err := New(Config{Region: "eu-central-1", KeyID: "key-1"})
	if err != nil || b.endpoint != "kms.eu-central-1.aliyuncs.com" {
		t.Errorf("endpoint %q, %v", b.endpoint, err)
	}
}

func TestMarshalContextIsDeterministic(t *testing.T) {
	got, err := marshalContext(map[string]string{"b": "2", "a": "1", "ü": `"`})
	if want := `{"a":"1","b":"2","ü":"\""}`; err != nil || got != want {
		t.Errorf("got %s, %v; want %s", got, err, want)
	}
}
