package alibaba

import (
	"bytes"
	"crypto/rand"
	"encoding/base64"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newBackend returns a backend for the double's default key with its default access key. change may
// alter the configuration.
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

// TestEncryptKeepsPlaintextOutOfURL holds the double to account for what it would otherwise only
// report.
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
		if e := asError(t, err); e.Class() != kmsclient.ClassInvalid || e.KeyID != key.KeyID {
			t.Errorf("context %v: %+v", other, e)
		}
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
		if e := asError(t, call()); e.Class() != kmsclient.ClassInvalid {
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
		if e.Class() != kmsclient.ClassInvalid && e.Class() != kmsclient.ClassKeyUnusable {
			t.Errorf("byte %d: %+v", i, e)
		}
	}
}
