// Package local is a KMS in a file: a software key for development, small clusters and recovery
// copies kept offline.
//
// Anyone who can read the file can decrypt every value, so only its owner may read it, and it must
// not be on the disks or in the backups of etcd. The file is YAML:
//
//	keys:
//	- {id: "1", secret: <base64 of 32 bytes>}
//	- {id: "2", secret: …}
//
// The last key wraps. All keys unwrap. A wrapped secret is nonce[12] | AES-256-GCM ciphertext |
// tag[16], with the key's id as additional data.
package local

import (
	"context"
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"fmt"
	"io/fs"
	"os"
	"sync"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/keyfile"
)

// Config names the key file.
type Config struct {
	KeyFile string
}

// KMS serves the keys of one file. It is safe for concurrent use. Each call reads the file again if
// it has changed. While the file cannot be read, calls fail with [kmsclient.Unreachable].
type KMS struct {
	path string

	mu   sync.Mutex // guards what follows, and reads of the file
	info fs.FileInfo
	keys *keys
}

var _ kmsclient.Service = (*KMS)(nil)

// keys are the ciphers of the keys in the file.
type keys struct {
	byID map[string]cipher.AEAD
	last string
}

// New reads the key file. Its errors name the line, and never contain a secret.
func New(cfg Config) (*KMS, error) {
	k := &KMS{path: cfg.KeyFile}
	if _, err := k.current(); err != nil {
		return nil, err
	}
	return k, nil
}

// current returns the keys. It reads the file again if it has changed.
func (k *KMS) current() (*keys, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	info, err := os.Stat(k.path)
	if err != nil {
		return nil, fmt.Errorf("read key file: %w", err)
	}
	if k.info != nil && os.SameFile(k.info, info) && info.ModTime().Equal(k.info.ModTime()) && info.Size() == k.info.Size() && info.Mode() == k.info.Mode() {
		return k.keys, nil
	}
	versions, info, err := keyfile.Read(k.path, form)
	if err != nil {
		return nil, err
	}
	made := &keys{byID: make(map[string]cipher.AEAD, len(versions))}
	for _, v := range versions {
		block, err := aes.NewCipher(v.Secret)
		if err != nil {
			return nil, fmt.Errorf("key file %s: key %q: %w", k.path, v.ID, err)
		}
		aead, err := cipher.NewGCMWithRandomNonce(block)
		if err != nil {
			return nil, fmt.Errorf("key file %s: key %q: %w", k.path, v.ID, err)
		}
		clear(v.Secret)
		made.byID[v.ID], made.last = aead, v.ID
	}
	k.info, k.keys = info, made
	return made, nil
}

func (k *KMS) keysFor(op string) (*keys, error) {
	made, err := k.current()
	if err != nil {
		return nil, &kmsclient.Error{Op: op, Reason: kmsclient.Unreachable, Detail: err.Error()}
	}
	return made, nil
}

// Encrypt implements [kmsclient.Service].
func (k *KMS) Encrypt(ctx context.Context, _ string, data []byte) (*service.EncryptResponse, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("wrap: %w", err)
	}
	made, err := k.keysFor("Encrypt")
	if err != nil {
		return nil, err
	}
	return &service.EncryptResponse{KeyID: made.last, Ciphertext: made.byID[made.last].Seal(nil, nil, data, []byte(made.last))}, nil //nolint:gosec // no nonce is passed: this AEAD draws its own
}

// Decrypt implements [kmsclient.Service].
func (k *KMS) Decrypt(ctx context.Context, _ string, req *service.DecryptRequest) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("unwrap: %w", err)
	}
	made, err := k.keysFor("Decrypt")
	if err != nil {
		return nil, err
	}
	aead, ok := made.byID[req.KeyID]
	if !ok {
		return nil, &kmsclient.Error{Op: "Decrypt", Reason: kmsclient.KeyGone, KeyID: req.KeyID, Detail: "the key file has no key of this id; put that version back into it"}
	}
	data, err := aead.Open(nil, nil, req.Ciphertext, []byte(req.KeyID))
	if err != nil {
		return nil, &kmsclient.Error{Op: "Decrypt", Reason: kmsclient.Invalid, KeyID: req.KeyID, Detail: "not wrapped by this key, or damaged"}
	}
	return data, nil
}

// Status implements [kmsclient.Service].
func (k *KMS) Status(ctx context.Context) (*service.StatusResponse, error) {
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("state: %w", err)
	}
	made, err := k.keysFor("Status")
	if err != nil {
		return nil, err
	}
	return &service.StatusResponse{Version: "v2", Healthz: "ok", KeyID: made.last}, nil
}

func newSecret() []byte {
	secret := make([]byte, secretSize)
	_, _ = rand.Read(secret) // never fails
	return secret
}
