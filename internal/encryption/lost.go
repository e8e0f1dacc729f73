package encryption

import (
	"context"
	"errors"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// lostKMS is in the place of a KMS whose key is treated as lost: every operation fails at once, as
// that of a KMS which does not have the key. It calls nothing.
type lostKMS struct{ provider string }

var _ kmsclient.Service = lostKMS{}

func (l lostKMS) err(op string) error {
	return &kmsclient.Error{Op: op, Provider: l.provider, Reason: kmsclient.KeyNotFound, Detail: "the key is treated as lost, and its KMS is not called"}
}

// Encrypt implements [kmsclient.Service].
func (l lostKMS) Encrypt(context.Context, string, []byte) (*service.EncryptResponse, error) {
	return nil, l.err("Encrypt")
}

// Decrypt implements [kmsclient.Service].
func (l lostKMS) Decrypt(context.Context, string, *service.DecryptRequest) ([]byte, error) {
	return nil, l.err("Decrypt")
}

// Status implements [kmsclient.Service].
func (l lostKMS) Status(context.Context) (*service.StatusResponse, error) {
	return nil, l.err("Status")
}

// addLost makes the ring of a provider that is treated as lost. It makes no backend, so that no
// file of the provider is read and nothing is connected. Of a provider of kind kubernetes nothing
// remains: its values are those of a provider that the rules do not read.
func (k *Keys) addLost(p config.KMS, cache *keyring.Cache) error {
	rc := keyring.RingConfig{Provider: p.Name, Cache: cache, ReadOnly: true, Observer: k.metrics.forProvider(p.Name), Logger: k.Logger}
	switch {
	case p.Kubernetes != nil:
		return nil
	case p.Age != nil:
		rc.Offline = lostIdentity{}
	default:
		rc.KMS = lostKMS{p.Name}
	}
	ring, err := keyring.New(rc)
	switch {
	case err != nil:
		return err
	case p.Age != nil:
		k.offline = append(k.offline, ring)
	default:
		k.rings = append(k.rings, ring)
	}
	return nil
}

// lostIdentity is in the place of an offline key whose private keys are treated as lost.
type lostIdentity struct{}

var _ keyring.OfflineKey = lostIdentity{}

var errLostIdentity = errors.New("its private keys are treated as lost")

// ID implements [keyring.OfflineKey].
func (lostIdentity) ID() string { return "lost" }

// Wrap implements [keyring.OfflineKey].
func (lostIdentity) Wrap([]byte) (file []byte, id string, err error) { return nil, "", errLostIdentity }

// CanUnwrap implements [keyring.OfflineKey]. It lets Unwrap say why it fails.
func (lostIdentity) CanUnwrap() bool { return true }

// Unwrap implements [keyring.OfflineKey].
func (lostIdentity) Unwrap([]byte) ([]byte, error) { return nil, errLostIdentity }
