package interop

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/pluginserver"
)

const requestID = "0b8c7a51-2f4e-4c55-9d1e-000000000001"

// cloud is a KMS with request IDs, like that of a cloud.
type cloud struct{ *kmstest.Memory }

// Encrypt implements service.Service.
func (c cloud) Encrypt(ctx context.Context, uid string, data []byte) (*service.EncryptResponse, error) {
	kmsclient.NoteRequestID(ctx, requestID)
	return c.Memory.Encrypt(ctx, uid, data)
}

func wrapper(tb testing.TB, backend kmsclient.Service) *kmsclient.Client {
	tb.Helper()
	c, err := kmsclient.New(kmsclient.Config{Name: provider, Backend: backend, Timeout: 10 * time.Second})
	if err != nil {
		tb.Fatal(err)
	}
	return c
}

// startOurServer serves a KMS with this project's plugin server until the test ends, and returns
// its endpoint.
func startOurServer(tb testing.TB, backend kmsclient.Service) *plugin {
	tb.Helper()
	dir, err := os.MkdirTemp("", "interop")
	if err != nil {
		tb.Fatal(err)
	}
	tb.Cleanup(func() { os.RemoveAll(dir) })
	endpoint := "unix://" + filepath.Join(dir, "kms.sock")
	server, err := pluginserver.New(pluginserver.Config{
		Provider: provider, KMS: wrapper(tb, backend), PollInterval: 20 * time.Millisecond, FailingPollInterval: 20 * time.Millisecond, SealUnreachableFor: time.Hour,
	})
	if err != nil {
		tb.Fatal(err)
	}
	listener, err := pluginserver.Listen(endpoint)
	if err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- server.Serve(ctx, listener) }()
	tb.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			tb.Error(err)
		}
	})
	return &plugin{tb: tb, endpoint: endpoint}
}

// newDirect is the proxy's side with the KMS itself, without a plugin.
func newDirect(tb testing.TB, backend kmsclient.Service) *ours {
	tb.Helper()
	cache, err := keyring.NewCache(keyring.CacheConfig{})
	if err != nil {
		tb.Fatal(err)
	}
	o := &ours{}
	o.ring, err = keyring.New(keyring.RingConfig{Provider: provider, KMS: wrapper(tb, backend), Cache: cache,
		PollInterval: 20 * time.Millisecond, SealUnreachableFor: time.Hour, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		tb.Fatal(err)
	}
	if o.Sealer, err = rule.New(rule.Config{Prefix: "/registry/", Write: o.ring}); err != nil {
		tb.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- o.ring.Run(ctx) }()
	tb.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			tb.Error(err)
		}
	})
	return o
}

// TestOurServer has kube-apiserver's transformer with our plugin server, the proxy with the same
// server, and the proxy with the KMS itself write and read each other's values, before and after a
// rotation that kube-apiserver learns of by Status.
func TestOurServer(t *testing.T) {
	backend := cloud{kmstest.NewMemory()}
	p := startOurServer(t, backend)
	they := newKube(t, p, provider, envelope.TypeSeed)
	via, direct := newOurs(t, p, provider), newDirect(t, backend)
	value := []byte("value")
	exchange := func(t *testing.T, keyID string) {
		// A ring that has not learned of the new key ID yet reports its values as stale.
		via.await(t, keyID)
		direct.await(t, keyID)
		for writer, seal := range map[string]func(testing.TB, []byte, []byte) []byte{"kube-apiserver": they.seal, "through the server": via.seal, "direct": direct.seal} {
			stored := seal(t, secretKey, value)
			o := decode(t, stored)
			if o.KeyID != keyID {
				t.Errorf("%s: key ID %q, want %q", writer, o.KeyID, keyID)
			}
			if _, named := o.Annotations["request-id.etcd-kms-proxy.io"]; named != (writer != "direct") {
				t.Errorf("%s: annotations %q", writer, o.Annotations)
			}
			fresh := newDirect(t, backend) // a transformer without a cached DEK seed
			fresh.await(t, keyID)
			for reader, open := range map[string]func([]byte, []byte) ([]byte, bool, error){
				"kube-apiserver": they.open, "a new kube-apiserver": newKube(t, p, provider, envelope.TypeSeed).open,
				"through the server": via.open, "direct": direct.open, "direct, a new ring": fresh.open,
			} {
				same(t, writer+", read by "+reader, value, false)(open(secretKey, stored))
			}
		}
	}
	t.Run("before", func(t *testing.T) { exchange(t, "memory/1") })
	backend.Rotate()
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		s, err := they.service.Status(t.Context())
		if err != nil || s.Healthz != "ok" || s.Version != "v2" {
			t.Fatalf("%+v, %v", s, err)
		}
		if s.KeyID == "memory/2" {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("Status does not follow the rotation")
		}
	}
	they.rotate(t, envelope.TypeSeed)
	via.await(t, "memory/2")
	direct.await(t, "memory/2")
	t.Run("after", func(t *testing.T) { exchange(t, "memory/2") })
}

// TestOurServersErrors checks which errors kube-apiserver's client gets from a KMS that fails, and
// that it recovers.
func TestOurServersErrors(t *testing.T) {
	f := kmstest.NewFault(kmstest.NewMemory())
	p := startOurServer(t, f.Service())
	client, err := kmsv2.NewGRPCService(t.Context(), p.endpoint, provider, 10*time.Second)
	if err != nil {
		t.Fatal(err)
	}
	const seed = "Canary-seed-of-thirty-two-bytes!"
	eventually := func(what string, ok func() bool) {
		t.Helper()
		for deadline := time.Now().Add(30 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatalf("no %s", what)
			}
		}
	}
	healthy := func() bool {
		s, err := client.Status(t.Context())
		return err == nil && s.Healthz == "ok" && s.KeyID == "memory/1"
	}
	eventually("good Status", healthy)
	for reason, want := range map[kmsclient.Reason]codes.Code{
		kmsclient.Unreachable: codes.Unavailable, kmsclient.Denied: codes.PermissionDenied, kmsclient.KeyDisabled: codes.FailedPrecondition,
		kmsclient.Invalid: codes.InvalidArgument, kmsclient.BrokenContract: codes.Internal,
	} {
		f.SetFault(func(op string, _ int) *kmstest.Failure {
			return &kmstest.Failure{Err: errors.Join(&kmsclient.Error{Op: op, Reason: reason}, errors.New(seed))}
		})
		if _, err := client.Encrypt(t.Context(), "uid", []byte(seed)); status.Code(err) != want || strings.Contains(err.Error(), seed) {
			t.Errorf("%v: Encrypt: %v", reason, err)
		}
		eventually("bad Status", func() bool {
			s, err := client.Status(t.Context())
			// the API server continues with the key that it has
			if reason == kmsclient.Unreachable {
				return err == nil && s.Healthz != "ok" && s.KeyID == "memory/1" && !strings.Contains(s.Healthz, seed)
			}
			return status.Code(err) == want && !strings.Contains(err.Error(), seed)
		})
		f.SetFault(nil)
		eventually("good Status again", healthy)
	}
}
