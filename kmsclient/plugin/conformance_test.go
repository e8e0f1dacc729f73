package plugin

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/goleak"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/local"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// newClient returns a client that is closed when the test ends.
func newClient(t *testing.T, cfg Config) *KMS {
	t.Helper()
	k, err := New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { k.Close() })
	return k
}

func newLocal(t *testing.T) *local.KMS {
	t.Helper()
	path := filepath.Join(t.TempDir(), "key.yaml")
	if err := local.NewKeyFile(path); err != nil {
		t.Fatal(err)
	}
	l, err := local.New(local.Config{KeyFile: path})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// TestConformance runs the suite of all backends on a key file behind a plugin.
func TestConformance(t *testing.T) {
	served := func(t *testing.T) kmsclient.Service {
		return newClient(t, Config{Endpoint: kmstest.PluginServer(t, newLocal(t))})
	}
	kmstest.Conformance(t, served)
	kmstest.ConformanceUnderFaults(t, served)
}

// classless is a service whose errors have no class, as those of most plugins.
type classless struct{ kmsclient.Service }

func (s classless) Decrypt(ctx context.Context, uid string, req *service.DecryptRequest) ([]byte, error) {
	data, err := s.Service.Decrypt(ctx, uid, req)
	if err != nil && ctx.Err() == nil {
		return nil, errors.New("unwrap: failed") // not %w
	}
	return data, err
}

// TestConformanceWithoutCodes runs it on a plugin that answers every failure with the code Unknown,
// as k8s.io/kms makes them.
func TestConformanceWithoutCodes(t *testing.T) {
	kmstest.Conformance(t, func(t *testing.T) kmsclient.Service {
		return newClient(t, Config{Endpoint: kmstest.PluginServer(t, classless{kmstest.NewMemory()})})
	}, kmstest.Opaque())
}

// TestConformanceWrapped runs it on the client as the proxy uses it.
func TestConformanceWrapped(t *testing.T) {
	kmstest.Conformance(t, func(t *testing.T) kmsclient.Service {
		c, err := kmsclient.New(kmsclient.Config{
			Name: "test", Backend: newClient(t, Config{Endpoint: kmstest.PluginServer(t, kmstest.NewMemory())}),
		})
		if err != nil {
			t.Fatal(err)
		}
		return c
	}, kmstest.MaxPlaintext(512)) // more cannot be stored once it is wrapped
}

// TestDamageOfOneValue: a plugin without codes is asked to unwrap what is damaged, time and again.
// All other calls are made as ever.
func TestDamageOfOneValue(t *testing.T) {
	c, err := kmsclient.New(kmsclient.Config{
		Name: "test", Backend: newClient(t, Config{Endpoint: kmstest.PluginServer(t, classless{kmstest.NewMemory()})}), MinBackoff: time.Millisecond,
	})
	if err != nil {
		t.Fatal(err)
	}
	sound, err := c.Encrypt(t.Context(), "uid", []byte("a secret"))
	if err != nil {
		t.Fatal(err)
	}
	unwrap := func(ciphertext []byte) error {
		_, err := c.Decrypt(t.Context(), "uid", &service.DecryptRequest{Ciphertext: ciphertext, KeyID: sound.KeyID, Annotations: sound.Annotations})
		return err
	}
	damaged := bytes.Clone(sound.Ciphertext)
	damaged[len(damaged)/2] ^= 1
	for range 20 {
		if err := unwrap(damaged); err == nil {
			t.Fatal("what is damaged was unwrapped")
		}
		if err := unwrap(sound.Ciphertext); err != nil {
			t.Fatalf("a sound value: %v", err)
		}
	}
	for range 20 {
		_ = unwrap(damaged)
	}
	_, serr := c.Status(t.Context())
	_, eerr := c.Encrypt(t.Context(), "uid", []byte("a secret"))
	if err := errors.Join(unwrap(sound.Ciphertext), serr, eerr); err != nil {
		t.Error(err)
	}
}

// TestConformanceOfPersonalities runs it on every public plugin that can be used, as it behaves.
func TestConformanceOfPersonalities(t *testing.T) {
	for _, p := range kmstest.Personalities() {
		t.Run(p.Name, func(t *testing.T) {
			served := func(t *testing.T) kmsclient.Service {
				return newClient(t, Config{Endpoint: kmstest.PluginServer(t, kmstest.NewPersona(p))})
			}
			if p.Unusable == "" {
				kmstest.Conformance(t, served, p.Opts()...)
				kmstest.ConformanceUnderFaults(t, served, p.Opts()...)
				return
			}
			// The caller finds out with its first secret.
			c, err := kmsclient.New(kmsclient.Config{Name: "test", Backend: served(t)})
			if err != nil {
				t.Fatal(err)
			}
			res, err := c.Encrypt(t.Context(), "uid", []byte(canary))
			if err == nil {
				_, err = c.Decrypt(kmsclient.Expect(t.Context(), sha256.Sum256([]byte(canary))), "uid", &service.DecryptRequest{Ciphertext: res.Ciphertext, KeyID: res.KeyID, Annotations: res.Annotations})
			}
			if asError(t, err).Class() != kmsclient.ClassContract {
				t.Errorf("%v, although %s", err, p.Unusable)
			}
		})
	}
}
