package alibaba

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/alibaba/kmsdouble"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newBackend returns a backend for the double's default key with its default access key. change may alter the configuration.
func newBackend(t *testing.T, d *kmsdouble.Double, change func(*Config)) *Backend {
	t.Helper()
	t.Setenv("ALIBABA_CLOUD_ACCESS_KEY_ID", kmsdouble.DefaultAccessKeyID)
	t.Setenv("ALIBABA_CLOUD_ACCESS_KEY_SECRET", kmsdouble.DefaultAccessKeySecret)
	cfg := Config{Region: d.Region(), KeyID: kmsdouble.DefaultKeyID, Endpoint: d.Endpoint(), CAFile: d.CAFile()}
	if change != nil {
		change(&cfg)
	}
	b, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = b.Close() })
	return b
}

// newPair returns a double and a backend for it.
func newPair(t *testing.T) (*kmsdouble.Double, *Backend) {
	t.Helper()
	d := kmsdouble.New(t, kmsdouble.Config{})
	return d, newBackend(t, d, nil)
}

// asError fails the test unless err wraps a *kmsclient.Error, which it returns.
func asError(t *testing.T, err error) *kmsclient.Error {
	t.Helper()
	var e *kmsclient.Error
	if !errors.As(err, &e) {
		t.Fatalf("got %v, want a *kmsclient.Error", err)
	}
	return e
}

func TestRoundTrip(t *testing.T) {
	d := kmsdouble.New(t, kmsdouble.Config{})
	arn := "acs:kms:" + d.Region() + ":154035569884:"
	for _, keyID := range []string{kmsdouble.DefaultKeyID, kmsdouble.DefaultAlias, arn + "key/" + kmsdouble.DefaultKeyID, arn + kmsdouble.DefaultAlias} {
		t.Run(keyID, func(t *testing.T) {
			b := newBackend(t, d, func(c *Config) {
				c.KeyID = keyID
				c.EncryptionContext = map[string]string{"cluster": "c1", "zone": `ü*~ +/="<&>`, "a": ""}
			})
			want := d.PrimaryKeyID(kmsdouble.DefaultKeyID)

			status, err := b.Status(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(&service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: want}, status); diff != "" {
				t.Errorf("status (-want +got):\n%s", diff)
			}

			key, err := b.GenerateDataKey(t.Context(), "uid")
			if err != nil {
				t.Fatal(err)
			}
			if key.KeyID != want {
				t.Errorf("data key names %q, want %q", key.KeyID, want)
			}
			if got, err := kmsdouble.VersionOf(key.Ciphertext); err != nil || got != want {
				t.Errorf("wrapped seed is of %q (%v), want %q as answered", got, err, want)
			}
			seed, err := b.Decrypt(t.Context(), "uid", &service.DecryptRequest{Ciphertext: key.Ciphertext, KeyID: key.KeyID})
			if err != nil || !bytes.Equal(seed, key.Plaintext) || len(seed) != 32 {
				t.Errorf("seed of %d bytes does not come back: %v", len(seed), err)
			}

			for _, size := range []int{1, 31, 32, 33, 255, 6144} {
				data := make([]byte, size)
				_, _ = rand.Read(data)
				sealed, err := b.Encrypt(t.Context(), "uid", data)
				if err != nil {
					t.Fatalf("%d bytes: %v", size, err)
				}
				got, err := b.Decrypt(t.Context(), "uid", &service.DecryptRequest{Ciphertext: sealed.Ciphertext, KeyID: sealed.KeyID})
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("%d bytes do not come back: %v", size, err)
				}
			}
		})
	}
}

// TestEncryptKeepsPlaintextOutOfURL holds the double to account for what it would otherwise only report.
func TestEncryptKeepsPlaintextOutOfURL(t *testing.T) {
	d, b := newPair(t)
	if _, err := b.Encrypt(t.Context(), "", []byte("seed")); err != nil {
		t.Fatal(err)
	}
	records := d.Records()
	if last := records[len(records)-1]; !last.Body {
		t.Error("Encrypt sent no body")
	}
}

func TestRotationIsSeenAndOldVersionsOpen(t *testing.T) {
	d, b := newPair(t)
	before, err := b.GenerateDataKey(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	version := d.Rotate(kmsdouble.DefaultKeyID)
	want := kmsdouble.DefaultKeyID + "/" + version
	if status, err := b.Status(t.Context()); err != nil || status.KeyID != want {
		t.Errorf("status = %+v, %v; want key ID %s", status, err, want)
	}
	if after, err := b.Encrypt(t.Context(), "", []byte("x")); err != nil || after.KeyID != want {
		t.Errorf("encrypt = %+v, %v; want key ID %s", after, err, want)
	}
	if _, err := b.Decrypt(t.Context(), "", &service.DecryptRequest{Ciphertext: before.Ciphertext, KeyID: before.KeyID}); err != nil {
		t.Errorf("old version: %v", err)
	}
	// A value that claims to be of another version than it is.
	_, err = b.Decrypt(t.Context(), "", &service.DecryptRequest{Ciphertext: before.Ciphertext, KeyID: want})
	if e := asError(t, err); e.Class != kmsclient.ClassContract || e.KeyID != want {
		t.Errorf("forged version: %+v", e)
	}
}

func TestAliasMovedToAnotherKey(t *testing.T) {
	d := kmsdouble.New(t, kmsdouble.Config{})
	b := newBackend(t, d, func(c *Config) { c.KeyID = kmsdouble.DefaultAlias })
	old, err := b.GenerateDataKey(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	if err := d.AddKey(kmsdouble.KeyConfig{ID: "key-second", Alias: kmsdouble.DefaultAlias}); err != nil {
		t.Fatal(err)
	}
	if status, err := b.Status(t.Context()); err != nil || !strings.HasPrefix(status.KeyID, "key-second/") {
		t.Errorf("status = %+v, %v", status, err)
	}
	if _, err := b.Decrypt(t.Context(), "", &service.DecryptRequest{Ciphertext: old.Ciphertext, KeyID: old.KeyID}); err != nil {
		t.Errorf("value of the first key: %v", err)
	}
}

func TestEncryptionContextBinds(t *testing.T) {
	d := kmsdouble.New(t, kmsdouble.Config{})
	with := func(m map[string]string) *Backend {
		return newBackend(t, d, func(c *Config) { c.EncryptionContext = m })
	}
	key, err := with(map[string]string{"cluster": "c1", "env": "prod"}).GenerateDataKey(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	req := &service.DecryptRequest{Ciphertext: key.Ciphertext, KeyID: key.KeyID}
	if _, err := with(map[string]string{"env": "prod", "cluster": "c1"}).Decrypt(t.Context(), "", req); err != nil {
		t.Errorf("the same context: %v", err)
	}
	for _, other := range []map[string]string{nil, {"cluster": "c1"}, {"cluster": "c2", "env": "prod"}} {
		_, err := with(other).Decrypt(t.Context(), "", req)
		if e := asError(t, err); e.Class != kmsclient.ClassInvalid || e.KeyID != key.KeyID {
			t.Errorf("context %v: %+v", other, e)
		}
	}
}

func TestKeyStates(t *testing.T) {
	for state, code := range map[kmsdouble.State]string{
		kmsdouble.Disabled: "Rejected.Disabled", kmsdouble.PendingDeletion: "Rejected.PendingDeletion", kmsdouble.PendingImport: "Rejected.PendingImport",
	} {
		t.Run(string(state), func(t *testing.T) {
			d, b := newPair(t)
			key, err := b.GenerateDataKey(t.Context(), "")
			if err != nil {
				t.Fatal(err)
			}
			d.SetState(kmsdouble.DefaultKeyID, state)
			for op, err := range allOperations(t, b, key) {
				e := asError(t, err)
				if e.Class != kmsclient.ClassKeyUnusable || e.Gone == (state == kmsdouble.Disabled) || e.Code != code || e.Op != op || e.RequestID == "" || !strings.HasPrefix(e.KeyID, kmsdouble.DefaultKeyID) {
					t.Errorf("%s: %+v", op, e)
				}
			}
			info, err := b.Describe(t.Context())
			if err != nil || info.State != string(state) {
				t.Errorf("describe = %+v, %v", info, err)
			}
			if pending := state == kmsdouble.PendingDeletion; pending != !info.DeleteAt.IsZero() {
				t.Errorf("DeleteAt = %v", info.DeleteAt)
			}
			d.SetState(kmsdouble.DefaultKeyID, kmsdouble.Enabled)
			for op, err := range allOperations(t, b, key) {
				if err != nil {
					t.Errorf("%s after the key was enabled: %v", op, err)
				}
			}
		})
	}
	t.Run("gone", func(t *testing.T) {
		d, b := newPair(t)
		key, err := b.GenerateDataKey(t.Context(), "")
		if err != nil {
			t.Fatal(err)
		}
		d.RemoveKey(kmsdouble.DefaultKeyID)
		for op, err := range allOperations(t, b, key) {
			if e := asError(t, err); e.Class != kmsclient.ClassKeyUnusable || !e.Gone || e.Code != "Forbidden.KeyNotFound" {
				t.Errorf("%s: %+v", op, e)
			}
		}
	})
}

// allOperations runs each operation once and returns its error by the name that the error must have.
func allOperations(t *testing.T, b *Backend, key *kmsclient.DataKey) map[string]error {
	t.Helper()
	errs := map[string]error{}
	_, errs["GenerateDataKey"] = b.GenerateDataKey(t.Context(), "")
	_, errs["Encrypt"] = b.Encrypt(t.Context(), "", []byte("x"))
	_, errs["Decrypt"] = b.Decrypt(t.Context(), "", &service.DecryptRequest{Ciphertext: key.Ciphertext, KeyID: key.KeyID})
	_, errs["Status"] = b.Status(t.Context())
	return errs
}

func TestDescribe(t *testing.T) {
	expires := time.Date(2031, 2, 3, 4, 5, 6, 0, time.UTC)
	d := kmsdouble.New(t, kmsdouble.Config{Keys: []kmsdouble.KeyConfig{{ID: kmsdouble.DefaultKeyID, MaterialExpires: expires}}})
	info, err := newBackend(t, d, nil).Describe(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if info.RequestID == "" {
		t.Error("no request ID")
	}
	info.RequestID = ""
	want := &KeyInfo{
		KeyID: d.PrimaryKeyID(kmsdouble.DefaultKeyID), State: "Enabled", Spec: "Aliyun_AES_256", ProtectionLevel: "SOFTWARE", Origin: "EXTERNAL",
		Creator: "154035569884****", AutomaticRotation: "Disabled", MaterialExpiresAt: expires, DeletionProtection: true,
	}
	if diff := cmp.Diff(want, info); diff != "" {
		t.Errorf("(-want +got):\n%s", diff)
	}
}

func TestDedicatedInstanceWithoutDescribeKey(t *testing.T) {
	d := kmsdouble.New(t, kmsdouble.Config{Dedicated: true})
	b := newBackend(t, d, nil)
	if status, err := b.Status(t.Context()); err != nil || status.KeyID != d.PrimaryKeyID(kmsdouble.DefaultKeyID) {
		t.Errorf("status = %+v, %v", status, err)
	}
	d.Rotate(kmsdouble.DefaultKeyID)
	if status, err := b.Status(t.Context()); err != nil || status.KeyID != d.PrimaryKeyID(kmsdouble.DefaultKeyID) {
		t.Errorf("status after rotation = %+v, %v", status, err)
	}
	d.SetState(kmsdouble.DefaultKeyID, kmsdouble.Disabled)
	_, err := b.Status(t.Context())
	if e := asError(t, err); e.Class != kmsclient.ClassKeyUnusable || e.Op != "Status" {
		t.Errorf("%+v", e)
	}
}

// TestAliasLeadsNowhere tells the loss of a name from that of a key.
func TestAliasLeadsNowhere(t *testing.T) {
	for _, keyID := range []string{kmsdouble.DefaultAlias, "acs:kms:cn-hangzhou:154035569884:" + kmsdouble.DefaultAlias, kmsdouble.DefaultKeyID} {
		for name, lose := range map[string]func(*kmsdouble.Double){
			"removed":   func(d *kmsdouble.Double) { d.RemoveAlias(kmsdouble.DefaultAlias) },
			"elsewhere": func(d *kmsdouble.Double) { d.SetAlias(kmsdouble.DefaultAlias, "key-none") },
			"the key":   func(d *kmsdouble.Double) { d.RemoveKey(kmsdouble.DefaultKeyID) },
		} {
			t.Run(keyID+"/"+name, func(t *testing.T) {
				d := kmsdouble.New(t, kmsdouble.Config{})
				b := newBackend(t, d, func(c *Config) { c.KeyID = keyID })
				key := mustDataKey(t, b)
				lose(d)
				for op, call := range operations(b, key) {
					err := call(t.Context())
					if keyID == kmsdouble.DefaultKeyID && name != "the key" || op == "Decrypt" && name != "the key" {
						if err != nil {
							t.Errorf("%s: %v", op, err)
						}
						continue
					}
					alias := keyID != kmsdouble.DefaultKeyID && op != "Decrypt"
					if e := asError(t, err); e.Class != kmsclient.ClassKeyUnusable || !e.Gone || e.Alias != alias || e.Missing == alias || alias != strings.Contains(e.Detail, "alias") {
						t.Errorf("%s: %+v", op, e)
					}
				}
			})
		}
	}
}

// TestDescribeKeyIsThrottled: the version is learned as on a dedicated instance, and so is it that the key may not be used.
func TestDescribeKeyIsThrottled(t *testing.T) {
	d, b := newPair(t)
	only := func(faults map[string]kmsdouble.FaultSpec) {
		d.SetFault(func(r *http.Request) *kmsdouble.FaultSpec {
			if f, ok := faults[r.URL.Query().Get("Action")]; ok {
				return &f
			}
			return nil
		})
	}
	for _, throttle := range []kmsdouble.FaultSpec{{Kind: kmsdouble.Throttle}, {Kind: kmsdouble.Throttle, Status: 400, Code: "Throttling.User"}} {
		only(map[string]kmsdouble.FaultSpec{"DescribeKey": throttle})
		d.Rotate(kmsdouble.DefaultKeyID)
		if status, err := b.Status(t.Context()); err != nil || status.KeyID != d.PrimaryKeyID(kmsdouble.DefaultKeyID) {
			t.Errorf("status = %+v, %v", status, err)
		}
		d.SetState(kmsdouble.DefaultKeyID, kmsdouble.Disabled)
		_, err := b.Status(t.Context())
		if e := asError(t, err); e.Class != kmsclient.ClassKeyUnusable || e.Op != "Status" {
			t.Errorf("%+v", e)
		}
		d.SetState(kmsdouble.DefaultKeyID, kmsdouble.Enabled)
		// Who may only read is not denied anything that reading needs.
		only(map[string]kmsdouble.FaultSpec{"DescribeKey": throttle, "GenerateDataKey": {Kind: kmsdouble.ErrorCode, Status: 403, Code: "Forbidden.NoPermission"}})
		_, err = b.Status(t.Context())
		if e := asError(t, err); e.Class != kmsclient.ClassUnavailable || e.Op != "Status" {
			t.Errorf("%+v", e)
		}
	}
	only(map[string]kmsdouble.FaultSpec{"DescribeKey": {Kind: kmsdouble.ServerError}})
	made := d.Calls("GenerateDataKey")
	if _, err := b.Status(t.Context()); err == nil || d.Calls("GenerateDataKey") != made {
		t.Errorf("a KMS that fails: %v, %d data keys", err, d.Calls("GenerateDataKey")-made)
	}
}

func TestArgumentsThatNeverReachTheKMS(t *testing.T) {
	d, b := newPair(t)
	blob := []byte(base64.StdEncoding.EncodeToString([]byte("blob")))
	for name, call := range map[string]func() error{
		"empty plaintext":    func() error { _, err := b.Encrypt(t.Context(), "", nil); return err },
		"over-long":          func() error { _, err := b.Encrypt(t.Context(), "", make([]byte, 6145)); return err },
		"empty ciphertext":   func() error { return decryptError(t, b, nil, "a/b") },
		"binary ciphertext":  func() error { return decryptError(t, b, []byte{0, 0xff}, "a/b") },
		"huge ciphertext":    func() error { return decryptError(t, b, bytes.Repeat([]byte("A"), 16<<10+1), "a/b") },
		"no key ID":          func() error { return decryptError(t, b, blob, "") },
		"key ID, no version": func() error { return decryptError(t, b, blob, "a") },
		"key ID of others":   func() error { return decryptError(t, b, blob, "a/b/c") },
	} {
		if e := asError(t, call()); e.Class != kmsclient.ClassInvalid {
			t.Errorf("%s: %+v", name, e)
		}
	}
	if n := len(d.Records()); n != 0 {
		t.Errorf("%d requests were sent", n)
	}
}

func decryptError(t *testing.T, b *Backend, ciphertext []byte, keyID string) error {
	t.Helper()
	_, err := b.Decrypt(t.Context(), "", &service.DecryptRequest{Ciphertext: ciphertext, KeyID: keyID})
	return err
}

func TestTamperedCiphertext(t *testing.T) {
	_, b := newPair(t)
	key, err := b.GenerateDataKey(t.Context(), "")
	if err != nil {
		t.Fatal(err)
	}
	for i := range key.Ciphertext {
		damaged := bytes.Clone(key.Ciphertext)
		damaged[i] = map[bool]byte{true: 'B', false: 'A'}[damaged[i] == 'A']
		e := asError(t, decryptError(t, b, damaged, key.KeyID))
		if e.Class != kmsclient.ClassInvalid && e.Class != kmsclient.ClassKeyUnusable {
			t.Errorf("byte %d: %+v", i, e)
		}
	}
}

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
