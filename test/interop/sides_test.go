package interop

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"testing"
	"time"

	"google.golang.org/protobuf/proto"
	"k8s.io/apiserver/pkg/storage/value"
	"k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2"
	kmstypes "k8s.io/apiserver/pkg/storage/value/encrypt/envelope/kmsv2/v2"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
)

// kube is kube-apiserver's side: its KMS v2 transformer with the marker in front, as in its
// encryption configuration.
type kube struct {
	transformer value.Transformer
	service     service.Service
	state       kmsv2.State
}

// newKube returns the transformer of one API server process: with its own DEK seed, or for TypeKey
// its own key.
func newKube(tb testing.TB, p *plugin, provider string, typ envelope.Type) *kube {
	tb.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	tb.Cleanup(cancel)
	client, err := kmsv2.NewGRPCService(ctx, p.endpoint, provider, 10*time.Second)
	if err != nil {
		tb.Fatal(err)
	}
	k := &kube{service: client}
	k.rotate(tb, typ)
	k.transformer = value.NewPrefixTransformers(errors.New("no matching prefix found"), value.PrefixTransformer{
		Prefix:      []byte("k8s:enc:kms:v2:" + provider + ":"),
		Transformer: kmsv2.NewEnvelopeTransformer(client, provider, func() (kmsv2.State, error) { return k.state, nil }, "interop"),
	})
	return k
}

// rotate does what the API server does when Status returns another key ID: it uses a new DEK seed
// from then on.
func (k *kube) rotate(tb testing.TB, typ envelope.Type) {
	tb.Helper()
	transformer, object, cacheKey, err := kmsv2.GenerateTransformer(context.Background(), "uid", k.service, typ == envelope.TypeSeed)
	if err != nil {
		tb.Fatal(err)
	}
	k.state = kmsv2.State{
		Transformer:                           transformer,
		EncryptedObjectKeyID:                  object.KeyID,
		EncryptedObjectEncryptedDEKSource:     object.EncryptedDEKSource,
		EncryptedObjectAnnotations:            object.Annotations,
		EncryptedObjectEncryptedDEKSourceType: object.EncryptedDEKSourceType,
		UID:                                   "uid",
		ExpirationTimestamp:                   time.Now().Add(writeDeadline),
		CacheKey:                              cacheKey,
	}
}

func (k *kube) seal(tb testing.TB, key, plaintext []byte) []byte {
	tb.Helper()
	stored, err := k.transformer.TransformToStorage(context.Background(), plaintext, value.DefaultContext(key))
	if err != nil {
		tb.Fatal(err)
	}
	return stored
}

func (k *kube) open(key, stored []byte) (plaintext []byte, stale bool, err error) {
	return k.transformer.TransformFromStorage(context.Background(), stored, value.DefaultContext(key))
}

// ours is this project's side: a rule that encrypts and reads with one provider, and accepts only
// encrypted values.
type ours struct {
	*rule.Sealer
	ring *keyring.Ring
}

// newOurs returns the sealer of one proxy process, with its own DEK seed.
func newOurs(tb testing.TB, p *plugin, provider string) *ours {
	tb.Helper()
	return newOursPolling(tb, p, provider, 20*time.Millisecond)
}

// newOursPolling is newOurs with a time between health checks, each of which unwraps DEK seeds.
func newOursPolling(tb testing.TB, p *plugin, provider string, interval time.Duration) *ours {
	tb.Helper()
	o := &ours{}
	cache, err := keyring.NewCache(keyring.CacheConfig{})
	if err != nil {
		tb.Fatal(err)
	}
	// A key that the plugin does not know must not revoke the other keys here: every health check
	// succeeds.
	o.ring, err = keyring.New(keyring.RingConfig{Provider: provider, KMS: newClient(tb, p, provider), Cache: cache,
		PollInterval: interval, FailingPollInterval: 20 * time.Millisecond, SealUnreachableFor: time.Hour, Logger: slog.New(slog.NewTextHandler(io.Discard, nil))})
	if err != nil {
		tb.Fatal(err)
	}
	o.Sealer, err = rule.New(rule.Config{Prefix: "/registry/", Write: o.ring})
	if err != nil {
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

func (o *ours) seal(tb testing.TB, key, plaintext []byte) []byte {
	tb.Helper()
	stored, err := o.Seal(context.Background(), key, plaintext)
	if err != nil {
		tb.Fatal(err)
	}
	return stored
}

// open decrypts stored as the rule does, and reports whether it is stale.
func (o *ours) open(key, stored []byte) (plaintext []byte, stale bool, err error) {
	plaintext, err = o.Open(context.Background(), nil, key, bytes.Clone(stored)) // decrypted in place
	if err != nil {
		return nil, false, err
	}
	again, state, err := o.Inspect(context.Background(), key, stored)
	if err != nil || string(again) != string(plaintext) {
		return nil, false, errors.New("Inspect does not agree with Open")
	}
	return plaintext, state != keyring.Current, nil
}

// await polls until the ring encrypts under a key ID.
func (o *ours) await(tb testing.TB, keyID string) {
	tb.Helper()
	for deadline := time.Now().Add(10 * time.Second); o.ring.State().SealedBy != keyID; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("the ring does not seal under %q: %+v", keyID, o.ring.State())
		}
	}
}

// decode returns kube-apiserver's view of a stored value.
func decode(tb testing.TB, stored []byte) *kmstypes.EncryptedObject {
	tb.Helper()
	_, object, ok := envelope.Split(stored)
	if !ok {
		tb.Fatalf("no marker on %.40q", stored)
	}
	o := &kmstypes.EncryptedObject{}
	if err := proto.Unmarshal(object, o); err != nil {
		tb.Fatal(err)
	}
	return o
}
