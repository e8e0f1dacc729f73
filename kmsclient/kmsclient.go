// Package kmsclient is the interface between the proxy and a key management service (KMS).
//
// A backend (the subpackages local, plugin and alibaba) implements [Service], the interface that
// Kubernetes' KMS v2 plugins implement, and may implement optional interfaces such as
// [DataKeyGenerator] and [Describer]. [New] wraps a backend in the rules that all of them share:
// the contract of the interface, its size limits, a timeout for each call, retries with full jitter
// and a circuit breaker. Each [Error] has one [Reason]. [Poller] runs health checks.
//
// The package knows nothing of values or etcd; crypto/keyring is its only caller in the data path.
// docs/design/adding-a-kms.md walks through a new backend.
package kmsclient

import (
	"bytes"
	"context"
	"crypto/rand"

	"k8s.io/kms/pkg/service"
)

// Service encrypts and decrypts short secrets (at most 6 KiB) under a KMS key, and reports that
// key's state. It is k8s.io/kms/pkg/service.Service. Implementations are safe for concurrent use,
// honour the context, do not retain or change their arguments, and return errors that wrap [*Error]
// wherever the cause is known.
//
// Encrypt's KeyID (1 to 1024 bytes) names the key version that was used; Status' KeyID is the one
// that Encrypt would use now.
type Service = service.Service

// DataKeyGenerator is the optional interface of a backend whose KMS generates data keys, so that
// the plaintext key never travels to the KMS.
type DataKeyGenerator interface {
	// GenerateDataKey returns a new data key of 32 bytes. The caller owns the result. uid
	// identifies the call in logs.
	GenerateDataKey(ctx context.Context, uid string) (*DataKey, error)
}

// WrapNewKey generates a data key and has a KMS wrap it by Encrypt.
func WrapNewKey(ctx context.Context, kms Service, uid string) (*DataKey, error) {
	key := make([]byte, dataKeySize)
	_, _ = rand.Read(key) // does not fail: crypto/rand ends the process instead
	// The KMS gets a copy: what it does with its argument cannot become the key.
	data := bytes.Clone(key)
	defer clear(data)
	res, err := kms.Encrypt(ctx, uid, data)
	if err != nil {
		return nil, err
	}
	if res == nil {
		return nil, &Error{Op: "Encrypt", Reason: BrokenContract, Detail: "the response is empty"}
	}
	return &DataKey{Plaintext: key, Ciphertext: res.Ciphertext, KeyID: res.KeyID, Annotations: res.Annotations}, nil
}

// DataKey is a data key in both forms.
type DataKey struct {
	Plaintext   []byte            // 32 bytes; never logged, never stored
	Ciphertext  []byte            // what Decrypt takes, 1 to 1024 bytes
	KeyID       string            // the KMS key version that wrapped it, 1 to 1024 bytes
	Annotations map[string][]byte // passed to Decrypt unchanged; keys are FQDNs
}
