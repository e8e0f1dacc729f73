package kmstest

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"fmt"
	"sync"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// memoryAnnotation holds a version's ID a second time and has to come back.
const memoryAnnotation = "version.kmstest.etcd-kms-proxy.io"

// Memory is an honest KMS in memory: AES-256-GCM under versioned keys, and data keys of its own. It
// is safe for concurrent use.
type Memory struct {
	mu       sync.Mutex
	versions map[string]cipher.AEAD
	current  string
}

var (
	_ kmsclient.Service          = (*Memory)(nil)
	_ kmsclient.DataKeyGenerator = (*Memory)(nil)
)

// NewMemory returns a KMS with one key version, "memory/1".
func NewMemory() *Memory {
	m := &Memory{versions: map[string]cipher.AEAD{}}
	m.Rotate()
	return m
}

// Rotate makes a new version, which then wraps, and returns its key ID. The earlier ones still
// unwrap.
func (m *Memory) Rotate() string {
	secret := make([]byte, 32)
	_, _ = rand.Read(secret) // never fails
	block, err := aes.NewCipher(secret)
	if err != nil {
		panic(err) // the length is right
	}
	aead, err := cipher.NewGCMWithRandomNonce(block)
	if err != nil {
		panic(err) // the block size is right
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.current = fmt.Sprintf("memory/%d", len(m.versions)+1)
	m.versions[m.current] = aead
	return m.current
}

func (m *Memory) version(id string) (string, cipher.AEAD) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if id == "" {
		id = m.current
	}
	return id, m.versions[id]
}

// Encrypt implements [kmsclient.Service].
func (m *Memory) Encrypt(ctx context.Context, _ string, data []byte) (*service.EncryptResponse, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("wrap: %w", err)
	}
	id, aead := m.version("")
	return &service.EncryptResponse{
		Ciphertext: aead.Seal(nil, nil, data, []byte(id)), KeyID: id, Annotations: map[string][]byte{memoryAnnotation: []byte(id)},
	}, nil
}

// under wraps data under one of the versions.
func (m *Memory) under(ctx context.Context, id string, data []byte) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("wrap: %w", err)
	}
	_, aead := m.version(id)
	return aead.Seal(nil, nil, data, []byte(id)), nil
}

// Decrypt implements [kmsclient.Service].
func (m *Memory) Decrypt(ctx context.Context, _ string, req *service.DecryptRequest) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("unwrap: %w", err)
	}
	fail := func(reason kmsclient.Reason, detail string) ([]byte, error) {
		return nil, &kmsclient.Error{Op: opDecrypt, Reason: reason, KeyID: req.KeyID, Detail: detail}
	}
	_, aead := m.version(req.KeyID)
	switch {
	case req.KeyID == "" || aead == nil:
		return fail(kmsclient.KeyGone, "no such key")
	case string(req.Annotations[memoryAnnotation]) != req.KeyID:
		return fail(kmsclient.Invalid, "the annotation did not come back")
	}
	data, err := aead.Open(nil, nil, req.Ciphertext, []byte(req.KeyID))
	if err != nil {
		return fail(kmsclient.Invalid, "not wrapped by this key, or damaged")
	}
	return data, nil
}

// Status implements [kmsclient.Service].
func (m *Memory) Status(ctx context.Context) (*service.StatusResponse, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	id, _ := m.version("")
	return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: id}, nil
}

// GenerateDataKey implements [kmsclient.DataKeyGenerator].
func (m *Memory) GenerateDataKey(ctx context.Context, uid string) (*kmsclient.DataKey, error) {
	key := make([]byte, 32)
	_, _ = rand.Read(key) // never fails
	res, err := m.Encrypt(ctx, uid, key)
	if err != nil {
		return nil, err
	}
	return &kmsclient.DataKey{Plaintext: key, Ciphertext: res.Ciphertext, KeyID: res.KeyID, Annotations: res.Annotations}, nil
}
