package alibaba

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestCredentialsFromFiles(t *testing.T) {
	d := kmsdouble.New(t, kmsdouble.Config{})
	var id, secret string
	b := newBackend(t, d, func(c *Config) {
		id, secret = writeFile(t, "id", "\n "+kmsdouble.DefaultAccessKeyID+" \n"), writeFile(t, "secret", kmsdouble.DefaultAccessKeySecret+"\r\n")
		c.Credentials = Credentials{Type: AccessKey, AccessKeyIDFile: id, AccessKeySecretFile: secret}
		t.Setenv("ALIBABA_CLOUD_ACCESS_KEY_ID", "wrong")
		t.Setenv("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "wrong")
	})
	mustDataKey(t, b)

	// The key is replaced, and the old one removed.
	d.SetAccessKey(kmsdouble.AccessKey{ID: "LTAInew", Secret: "secretnew"})
	d.RemoveAccessKey(kmsdouble.DefaultAccessKeyID)
	_, err := b.GenerateDataKey(t.Context(), "")
	if e := asError(t, err); e.Class() != kmsclient.ClassDenied || e.Code != "InvalidAccessKeyId.NotFound" {
		t.Errorf("%+v", e)
	}
	if n := d.Calls("GenerateDataKey"); n != 2 {
		t.Errorf("%d calls: the same credentials were tried again", n)
	}
	replaceFile(t, id, "LTAInew")
	replaceFile(t, secret, "secretnew")
	mustDataKey(t, b)

	// A file that is being replaced carelessly.
	for _, broken := range []string{"", "two words", "\x00", strings.Repeat("x", maxCredentialFile+1)} {
		replaceFile(t, secret, broken)
		mustDataKey(t, b)
	}
	if err := os.Remove(secret); err != nil {
		t.Fatal(err)
	}
	mustDataKey(t, b)
}

// TestCredentialsReplacedDuringACall replaces a file while a request that was signed with its old
// content is under way: the call signs once more with the new one, and not a third time.
func TestCredentialsReplacedDuringACall(t *testing.T) {
	for name, second := range map[string][]kmsdouble.FaultSpec{
		"accepted":         nil,
		"unknown key":      {{Kind: kmsdouble.ErrorCode, Status: 404, Code: "InvalidAccessKeyId.NotFound"}},
		"expired again":    {{Kind: kmsdouble.ErrorCode, Code: "InvalidSecurityToken.Expired"}},
		"signature, again": {{Kind: kmsdouble.ErrorCode, Code: "SignatureDoesNotMatch"}},
	} {
		t.Run(name, func(t *testing.T) {
			d := kmsdouble.New(t, kmsdouble.Config{AccessKeys: []kmsdouble.AccessKey{{ID: "LTAI", Secret: "s", Token: "new"}}})
			var token string
			b := newBackend(t, d, func(c *Config) {
				token = writeFile(t, "token", "old")
				c.Credentials = Credentials{
					Type: STS, AccessKeyIDFile: writeFile(t, "id", "LTAI"), AccessKeySecretFile: writeFile(t, "secret", "s"), SecurityTokenFile: token,
				}
			})
			release := make(chan struct{})
			d.Inject("GenerateDataKey", append([]kmsdouble.FaultSpec{{Kind: kmsdouble.Hang, Release: release}}, second...)...)
			done := make(chan error, 1)
			go func() {
				_, err := b.GenerateDataKey(t.Context(), "")
				done <- err
			}()
			for deadline := time.Now().Add(10 * time.Second); d.Pending() > len(second); time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("no request came")
				}
			}
			replaceFile(t, token, "new")
			close(release)
			err := <-done
			if second == nil {
				if err != nil {
					t.Error(err)
				}
			} else if e := asError(t, err); e.Class() != kmsclient.ClassDenied || e.Code != second[0].Code {
				t.Errorf("%+v", e)
			}
			if n := d.Calls("GenerateDataKey"); n != 2 {
				t.Errorf("%d calls", n)
			}
			mustDataKey(t, b)
		})
	}
}

func TestSTSToken(t *testing.T) {
	clock := time.Now()
	d := kmsdouble.New(t, kmsdouble.Config{
		AccessKeys: []kmsdouble.AccessKey{{ID: "STS.abc", Secret: "s", Token: "t+/=", Expires: clock.Add(time.Hour)}},
		Now:        func() time.Time { return clock },
	})
	b := newBackend(t, d, func(c *Config) {
		t.Setenv("ALIBABA_CLOUD_ACCESS_KEY_ID", "STS.abc")
		t.Setenv("ALIBABA_CLOUD_ACCESS_KEY_SECRET", "s")
		t.Setenv("ALIBABA_CLOUD_SECURITY_TOKEN", "t+/=")
		c.Credentials.Type = STS
	})
	mustDataKey(t, b)
	for name, tc := range map[string]struct {
		key  kmsdouble.AccessKey
		code string
	}{
		"expired":   {kmsdouble.AccessKey{ID: "STS.abc", Secret: "s", Token: "t+/=", Expires: clock.Add(-time.Second)}, "InvalidSecurityToken.Expired"},
		"replaced":  {kmsdouble.AccessKey{ID: "STS.abc", Secret: "s", Token: "other"}, "InvalidSecurityToken.Malformed"},
		"no longer": {kmsdouble.AccessKey{ID: "STS.abc", Secret: "s"}, "InvalidSecurityToken.MismatchWithAccessKey"},
		"secret":    {kmsdouble.AccessKey{ID: "STS.abc", Secret: "x", Token: "t+/="}, "SignatureDoesNotMatch"},
	} {
		d.SetAccessKey(tc.key)
		_, err := b.GenerateDataKey(t.Context(), "")
		if e := asError(t, err); e.Class() != kmsclient.ClassDenied || e.Code != tc.code {
			t.Errorf("%s: %+v", name, e)
		}
	}
}

func TestClockSkew(t *testing.T) {
	for _, skew := range []time.Duration{-14 * time.Minute, 14 * time.Minute, -16 * time.Minute, 16 * time.Minute} {
		d := kmsdouble.New(t, kmsdouble.Config{Now: func() time.Time { return time.Now().Add(skew) }})
		_, err := newBackend(t, d, nil).GenerateDataKey(t.Context(), "")
		if skew.Abs() < 15*time.Minute {
			if err != nil {
				t.Errorf("%v: %v", skew, err)
			}
			continue
		}
		if e := asError(t, err); e.Class() != kmsclient.ClassDenied || !strings.Contains(e.Detail, "clocks") {
			t.Errorf("%v: %+v", skew, e)
		}
	}
}

func TestCredentialFilesAreNotQuoted(t *testing.T) {
	dir := t.TempDir()
	for name, text := range map[string]string{"spaces": canarySecret + " x", "control": canarySecret + "\x01", "long": strings.Repeat(canarySecret, maxCredentialFile/len(canarySecret)+1)} {
		path := filepath.Join(dir, name)
		replaceFile(t, path, text)
		_, err := New(Config{Region: "r", KeyID: "k", Credentials: Credentials{AccessKeyIDFile: path, AccessKeySecretFile: path}})
		if err == nil {
			t.Errorf("%s: no error", name)
			continue
		}
		checkNoCanary(t, "error", err.Error())
	}
}

func writeFile(t *testing.T, name, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), name)
	replaceFile(t, path, text)
	return path
}

// replaceFile puts a file in place by renaming, as an operator should.
func replaceFile(t *testing.T, path, text string) {
	t.Helper()
	if err := os.WriteFile(path+".new", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		t.Fatal(err)
	}
}
