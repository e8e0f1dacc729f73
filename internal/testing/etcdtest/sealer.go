package etcdtest

import (
	"bytes"
	"context"
	"crypto/sha256"
	"slices"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
)

// Sealer is a rule's sealer whose ciphertext is readable: it names the KMS key, and is bound to
// etcd's key as real ciphertext is.
type Sealer struct {
	KeyID string
	// Down returns the error of a KMS that is out of reach, nil while it is well. May be nil.
	Down func() *keyring.Error
}

// Marker is the prefix of the values of a [Sealer].
const Marker = "k8s:enc:kms:v2:main:"

// Seal implements the interface of package inventory.
func (s Sealer) Seal(_ context.Context, key, value []byte) ([]byte, error) {
	if err := s.down(); err != nil {
		return nil, err
	}
	digest := sha256.Sum256(key)
	o := envelope.Object{Header: envelope.Header{Type: envelope.TypeSeed, KeyID: s.KeyID, Source: []byte("seed " + s.KeyID)}, Data: slices.Concat(digest[:], value)}
	return o.Append([]byte(Marker))
}

func (s Sealer) down() error {
	if s.Down == nil || s.Down() == nil {
		return nil
	}
	return s.Down()
}

// Inspect implements the interface of package inventory.
func (s Sealer) Inspect(_ context.Context, key, stored []byte) ([]byte, keyring.ValueState, error) {
	_, object, ok := envelope.Split(stored)
	if !ok {
		return stored, keyring.Unencrypted, nil
	}
	if err := s.down(); err != nil {
		return nil, keyring.Undecryptable, err
	}
	o, err := envelope.Parse(object)
	digest := sha256.Sum256(key)
	if err != nil || !bytes.HasPrefix(o.Data, digest[:]) {
		return nil, keyring.Undecryptable, &keyring.Error{Kind: keyring.Corrupt, Text: "it is of another key"}
	}
	if o.KeyID != s.KeyID {
		return o.Data[len(digest):], keyring.Stale, nil
	}
	return o.Data[len(digest):], keyring.Current, nil
}

// Sealed implements the interface of package inventory.
func (s Sealer) Sealed(stored []byte) bool { return bytes.HasPrefix(stored, []byte(Marker)) }

// Recheck implements the interface of package inventory.
func (s Sealer) Recheck([]byte) (keyring.State, bool) {
	if s.down() != nil {
		return keyring.State{Reason: "out of reach"}, true
	}
	return keyring.State{Healthy: true, LastGood: time.Now()}, true
}
