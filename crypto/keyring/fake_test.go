package keyring

import (
	"bytes"
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fakeKMS is a KMS that keeps the contract and has its callers keep it: a wrong use fails the test.
// Its key IDs are versions of one key, and each has a secret of its own.
type fakeKMS struct {
	t    *testing.T
	name string

	mu       sync.Mutex
	keys     map[string]cipher.AEAD
	current  string            // the key ID that wraps
	statusID string            // what Status says, if not current
	down     error             // every call answers this, without having done anything
	lost     error             // every call does its work and then answers this
	keyErr   map[string]error  // Decrypt under a key ID answers this
	opErr    map[string]error  // an operation answers this
	delay    time.Duration     // before an answer
	health   string            // Healthz
	annotate map[string][]byte // given with each wrapped seed and demanded back
	result   func([]byte) []byte
	calls    map[string]int
	uids     map[string]bool
}

func newKMS(t *testing.T, name string) *fakeKMS {
	k := &fakeKMS{
		t: t, name: name, keys: map[string]cipher.AEAD{}, keyErr: map[string]error{}, opErr: map[string]error{}, health: "ok",
		calls: map[string]int{}, uids: map[string]bool{},
	}
	k.rotate("key-1")
	return k
}

func (k *fakeKMS) rotate(id string) {
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
	k.set(func() { k.keys[id], k.current = aead, id })
}

func (k *fakeKMS) set(change func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	change()
}

func (k *fakeKMS) count(op string) int {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.calls[op]
}

func kmsError(op string, reason kmsclient.Reason) error {
	return &kmsclient.Error{Op: op, Reason: reason, Code: "Code." + reason.String(), RequestID: "req-7", KeyID: "key-1"}
}

// ofContact marks the context of a ring's contacts, so that their Decrypt is counted as "Probe",
// apart from that of values.
type ofContact struct{}

// begin counts a call, waits as the fake was told to, and answers the fault that was set for it.
func (k *fakeKMS) begin(ctx context.Context, op, uid string) (err, lost error) {
	k.mu.Lock()
	if op == "Decrypt" && ctx.Value(ofContact{}) != nil {
		k.calls["Probe"]++
	} else {
		k.calls[op]++
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
	delay := k.delay
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
	if err == nil && k.down != nil {
		err = k.down
	}
	if err == nil {
		err = k.opErr[op]
	}
	return err, k.lost
}

func (k *fakeKMS) wrap(data []byte) *service.EncryptResponse {
	k.mu.Lock()
	defer k.mu.Unlock()
	aad, err := json.Marshal(k.annotate)
	if err != nil {
		k.t.Error(err)
	}
	return &service.EncryptResponse{Ciphertext: k.keys[k.current].Seal(nil, nil, data, aad), KeyID: k.current, Annotations: maps.Clone(k.annotate)}
}

func (k *fakeKMS) Encrypt(ctx context.Context, uid string, data []byte) (*service.EncryptResponse, error) {
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

func (k *fakeKMS) Decrypt(ctx context.Context, uid string, req *service.DecryptRequest) ([]byte, error) {
	err, lost := k.begin(ctx, "Decrypt", uid)
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := k.keyErr[req.KeyID]; err != nil {
		return nil, err
	}
	aead, ok := k.keys[req.KeyID]
	if !ok {
		return nil, kmsError("Decrypt", kmsclient.KeyDisabled)
	}
	aad, err := json.Marshal(req.Annotations)
	if err != nil {
		k.t.Error(err)
	}
	plain, err := aead.Open(nil, nil, req.Ciphertext, aad)
	if err != nil {
		return nil, kmsError("Decrypt", kmsclient.Invalid)
	}
	if lost != nil {
		return nil, lost
	}
	if k.result != nil {
		plain = k.result(plain)
	}
	return plain, nil
}

func (k *fakeKMS) Status(ctx context.Context) (*service.StatusResponse, error) {
	err, lost := k.begin(ctx, "Status", "")
	if err != nil {
		return nil, err
	}
	if lost != nil {
		return nil, lost
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	id := k.statusID
	if id == "" {
		id = k.current
	}
	return &service.StatusResponse{Version: "v2", Healthz: k.health, KeyID: id}, nil
}

// keyMaker is a fakeKMS that makes data keys itself.
type keyMaker struct {
	*fakeKMS
	change func(*kmsclient.DataKey)
}

func (g *keyMaker) GenerateDataKey(ctx context.Context, uid string) (*kmsclient.DataKey, error) {
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
	if g.change != nil {
		g.change(k)
	}
	return k, nil
}

// put stores a value of any type in the format, sealed under a secret of the test, by way of the
// KMS. It is the foreign writer.
func (k *fakeKMS) header(secret []byte, typ envelope.Type) envelope.Header {
	a := k.wrap(append([]byte(nil), secret...))
	return envelope.Header{Type: typ, KeyID: a.KeyID, Source: a.Ciphertext, Annotations: a.Annotations}
}

func (k *fakeKMS) sealed(t *testing.T, key, value string) []byte {
	t.Helper()
	secret := make([]byte, 32)
	_, _ = rand.Read(secret)
	seed, err := envelope.NewSeed(envelope.TypeSeed, secret)
	if err != nil {
		t.Fatal(err)
	}
	f, err := envelope.NewFrame(k.name, k.header(secret, envelope.TypeSeed), seed)
	if err != nil {
		t.Fatal(err)
	}
	stored, err := f.Seal([]byte(key), []byte(value))
	if err != nil {
		t.Fatal(err)
	}
	return stored
}

// events counts what an Observer is told.
type events struct {
	mu     sync.Mutex
	counts map[string]int
}

func (e *events) add(name string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if e.counts == nil {
		e.counts = map[string]int{}
	}
	e.counts[name]++
}

func (e *events) get(name string) int {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.counts[name]
}

func (e *events) Sealed(rule string, o Outcome)     { e.add("sealed " + rule + " " + string(o)) }
func (e *events) Opened(rule string, o Outcome)     { e.add("opened " + rule + " " + string(o)) }
func (e *events) Seed(provider string, event Event) { e.add(provider + " " + string(event)) }
func (e *events) Recovered(provider, by string)     { e.add(provider + " by " + by) }
func (e *events) CopyUnwrapped(provider, by, keyID, why string) {
	e.add(fmt.Sprintf("rescue %s by %s %s: %t", provider, by, keyID, why != ""))
}

var quiet = slog.New(slog.NewTextHandler(io.Discard, nil))

// rig is a ring over a fakeKMS, with a sealer that writes with it.
type rig struct {
	*Ring
	kms    *fakeKMS
	cache  *Cache
	events *events
	sealer *Sealer
	stop   func()
}

func newRing(t *testing.T, kms *fakeKMS, change func(*RingConfig, *CacheConfig)) *rig {
	t.Helper()
	g := &rig{kms: kms, events: &events{}}
	rc := RingConfig{Provider: kms.name, KMS: kms, SealUnreachableFor: time.Hour, Observer: g.events, Logger: quiet}
	cc := CacheConfig{ServeUnreachableFor: 24 * time.Hour}
	if change != nil {
		change(&rc, &cc)
	}
	var err error
	if rc.Cache == nil {
		if rc.Cache, err = NewCache(cc); err != nil {
			t.Fatal(err)
		}
	}
	g.cache = rc.Cache
	if g.Ring, err = New(rc); err != nil {
		t.Fatal(err)
	}
	sc := SealerConfig{Prefix: "/s/", Write: g.Ring, AllowPlaintextReads: true, Observer: g.events}
	if rc.ReadOnly {
		sc.Write, sc.Read = nil, []*Ring{g.Ring}
	}
	if g.sealer, err = NewSealer(sc); err != nil {
		t.Fatal(err)
	}
	return g
}

// start runs the ring; the test's end stops it and waits.
func (g *rig) start(t *testing.T) *rig {
	t.Helper()
	ctx, cancel := context.WithCancel(context.WithValue(context.Background(), ofContact{}, true))
	done := make(chan error, 1)
	go func() { done <- g.Run(ctx) }()
	var once sync.Once
	g.stop = func() {
		once.Do(func() {
			cancel()
			if err := <-done; err != nil {
				t.Errorf("Run: %v", err)
			}
		})
	}
	t.Cleanup(g.stop)
	return g
}

func (g *rig) seal(key, value string) ([]byte, error) {
	return g.sealer.Seal(context.Background(), []byte(key), []byte(value))
}

func (g *rig) open(key string, stored []byte) (string, error) {
	b, err := g.sealer.Open(context.Background(), []byte(key), bytes.Clone(stored))
	return string(b), err
}

func (g *rig) mustSeal(t *testing.T, key, value string) []byte {
	t.Helper()
	b, err := g.seal(key, value)
	if err != nil {
		t.Fatalf("seal: %v", err)
	}
	return b
}

func (g *rig) mustOpen(t *testing.T, key string, stored []byte, want string) {
	t.Helper()
	if got, err := g.open(key, stored); err != nil || got != want {
		t.Fatalf("open = %q, %v, want %q", got, err, want)
	}
}

func wantKind(t *testing.T, err error, kind Kind) {
	t.Helper()
	if e, ok := errors.AsType[*Error](err); !ok || e.Kind != kind {
		t.Fatalf("error %v, want kind %v", err, kind)
	}
}

func keyIDOf(t *testing.T, stored []byte) string {
	t.Helper()
	_, object, ok := envelope.Split(stored)
	if !ok {
		t.Fatalf("not a sealed value: %q", stored)
	}
	o, err := envelope.Parse(object)
	if err != nil {
		t.Fatal(err)
	}
	return o.KeyID
}
