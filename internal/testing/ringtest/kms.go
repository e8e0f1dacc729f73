// Package ringtest has what the tests of keyrings and rules share: a [KMS] with faults, a [Rig] of
// one ring and a rule over it, and a [Site] with a recovery provider.
package ringtest

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"maps"
	"sync"
	"testing"
	"time"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// KMS is a KMS that keeps the contract and has its callers keep it: a wrong use fails the test.
// Its key IDs are versions of one key, and each has a secret of its own.
type KMS struct {
	t    *testing.T
	Name string

	mu       sync.Mutex
	Keys     map[string]cipher.AEAD
	Current  string            // the key ID that wraps
	StatusID string            // what Status says, if not current
	Down     error             // every call answers this, without having done anything
	Lost     error             // every call does its work and then answers this
	KeyErr   map[string]error  // Decrypt under a key ID answers this
	OpErr    map[string]error  // an operation answers this
	Delay    time.Duration     // before an answer
	Health   string            // Healthz
	Annotate map[string][]byte // given with each wrapped seed and demanded back
	Result   func([]byte) []byte
	Calls    map[string]int
	uids     map[string]bool
}

func NewKMS(t *testing.T, name string) *KMS {
	k := &KMS{
		t: t, Name: name, Keys: map[string]cipher.AEAD{}, KeyErr: map[string]error{}, OpErr: map[string]error{}, Health: "ok",
		Calls: map[string]int{}, uids: map[string]bool{},
	}
	k.Rotate("key-1")
	return k
}

func (k *KMS) Rotate(id string) {
	secret := make([]byte, 32)
	_, _ = rand.Read(secret)
	block, err := aes.NewCipher(secret)
	if err != nil {
		k.t.Fatal(err)
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		k.t.Fatal(err)
	}
	k.Set(func() { k.Keys[id], k.Current = aead, id })
}

func (k *KMS) Set(change func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	change()
}

func (k *KMS) Count(op string) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.Calls[op]
}

func KMSError(op string, reason kmsclient.Reason) error {
	return &kmsclient.Error{Op: op, Reason: reason, Code: "Code." + reason.String(), RequestID: "req-7", KeyID: "key-1"}
}

// OfHealthCheck marks the context of a ring's health checks, so that their Decrypt is counted as
// "Probe", apart from that of values.
type OfHealthCheck struct{}

// begin counts a call, waits as the fake was told to, and answers the fault that was set for it.
func (k *KMS) begin(ctx context.Context, op, uid string) (err, lost error) {
	k.mu.Lock()
	if op == "Decrypt" && ctx.Value(OfHealthCheck{}) != nil {
		k.Calls["Probe"]++
	} else {
		k.Calls[op]++
	}
	if op != "Status" {
		if uid == "" || k.uids[uid] {
			k.t.Errorf("%s: uid %q is empty or was used before", op, uid)
		}
		k.uids[uid] = true
	}
	if _, ok := ctx.Deadline(); !ok {
		k.t.Errorf("%s: the context has no deadline", op)
	}
	delay := k.Delay
	k.mu.Unlock()
	if delay > 0 {
		select {
		case <-time.After(delay):
		case <-ctx.Done():
			err = ctx.Err()
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if err == nil && k.Down != nil {
		err = k.Down
	}
	if err == nil {
		err = k.OpErr[op]
	}
	return err, k.Lost
}

func (k *KMS) wrap(data []byte) *service.EncryptResponse {
	k.mu.Lock()
	defer k.mu.Unlock()
	aad, err := json.Marshal(k.Annotate)
	if err != nil {
		k.t.Error(err)
	}
	return &service.EncryptResponse{Ciphertext: k.Keys[k.Current].Seal(nil, nil, data, aad), KeyID: k.Current, Annotations: maps.Clone(k.Annotate)}
}

func (k *KMS) Encrypt(ctx context.Context, uid string, data []byte) (*service.EncryptResponse, error) {
	err, lost := k.begin(ctx, "Encrypt", uid)
	if err != nil {
		return nil, err
	}
	if len(data) != 32 {
		k.t.Errorf("Encrypt of %d bytes", len(data))
	}
	answer := k.wrap(data)
	clear(data) // what a backend does with its argument must not matter
	if lost != nil {
		return nil, lost
	}
	return answer, nil
}

func (k *KMS) Decrypt(ctx context.Context, uid string, req *service.DecryptRequest) ([]byte, error) {
	err, lost := k.begin(ctx, "Decrypt", uid)
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.KeyErr[req.KeyID]; err != nil {
		return nil, err
	}
	aead, ok := k.Keys[req.KeyID]
	if !ok {
		return nil, KMSError("Decrypt", kmsclient.KeyDisabled)
	}
	aad, err := json.Marshal(req.Annotations)
	if err != nil {
		k.t.Error(err)
	}
	plain, err := aead.Open(nil, nil, req.Ciphertext, aad)
	if err != nil {
		return nil, KMSError("Decrypt", kmsclient.Invalid)
	}
	if lost != nil {
		return nil, lost
	}
	if k.Result != nil {
		plain = k.Result(plain)
	}
	return plain, nil
}

func (k *KMS) Status(ctx context.Context) (*service.StatusResponse, error) {
	err, lost := k.begin(ctx, "Status", "")
	if err != nil {
		return nil, err
	}
	if lost != nil {
		return nil, lost
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	id := k.StatusID
	if id == "" {
		id = k.Current
	}
	return &service.StatusResponse{Version: "v2", Healthz: k.Health, KeyID: id}, nil
}

// KeyMaker is a [KMS] that makes data keys itself.
type KeyMaker struct {
	*KMS
	Change func(*kmsclient.DataKey)
}

func (g *KeyMaker) GenerateDataKey(ctx context.Context, uid string) (*kmsclient.DataKey, error) {
	err, lost := g.begin(ctx, "GenerateDataKey", uid)
	if err != nil {
		return nil, err
	}
	seed := make([]byte, 32)
	_, _ = rand.Read(seed)
	a := g.wrap(seed)
	if lost != nil {
		return nil, lost
	}
	k := &kmsclient.DataKey{Plaintext: seed, Ciphertext: a.Ciphertext, KeyID: a.KeyID, Annotations: a.Annotations}
	if g.Change != nil {
		g.Change(k)
	}
	return k, nil
}

func (k *KMS) Header(secret []byte, typ envelope.Type) envelope.Header {
	a := k.wrap(append([]byte(nil), secret...))
	return envelope.Header{Type: typ, KeyID: a.KeyID, Source: a.Ciphertext, Annotations: a.Annotations}
}

func (k *KMS) Encrypted(t *testing.T, key, value string) []byte {
	t.Helper()
	secret := make([]byte, 32)
	_, _ = rand.Read(secret)
	seed, err := envelope.NewSeed(envelope.TypeSeed, secret)
	if err != nil {
		t.Fatal(err)
	}
	f, err := envelope.NewFrame(k.Name, k.Header(secret, envelope.TypeSeed), seed)
	if err != nil {
		t.Fatal(err)
	}
	stored, err := f.Seal(nil, []byte(key), []byte(value))
	if err != nil {
		t.Fatal(err)
	}
	return stored
}
