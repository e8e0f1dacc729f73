package rule

import (
	"context"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
)

// Inspect decrypts stored without the rule's policies, leaves it as it is, and returns its state.
// It compares with the key ID from the last Status. The plaintext of a foreign or unencrypted value
// is stored itself. The error is not nil exactly for [keyring.Undecryptable]; it is a
// [*keyring.Error].
func (s *Sealer) Inspect(ctx context.Context, key, stored []byte) ([]byte, keyring.ValueState, error) {
	plaintext, used, outcome, err := s.open(ctx, key, stored, keyring.Mode{})
	switch {
	case err != nil:
		return nil, keyring.Undecryptable, err.InRule(s.cfg.Prefix)
	case outcome == OutcomeForeign:
		return plaintext, keyring.Foreign, nil
	case outcome == OutcomePlaintext && s.cfg.Write == nil:
		return plaintext, keyring.Current, nil
	case outcome == OutcomePlaintext:
		return plaintext, keyring.Unencrypted, nil
	case !used.IsCurrent(s.cfg.Write):
		return plaintext, keyring.Stale, nil
	}
	return plaintext, keyring.Current, nil
}

// Recheck starts a health check of a stored value's provider, does not wait for it, and returns the
// provider's state before: a LastGood after a refusal says that the KMS itself works. ok is false
// if the rule has no KMS provider for the value.
func (s *Sealer) Recheck(stored []byte) (st keyring.State, ok bool) {
	provider, _, ok := envelope.Split(stored)
	if !ok {
		return keyring.State{}, false
	}
	r := s.ring(provider)
	if r == nil {
		return keyring.State{}, false
	}
	r.Check()
	return r.State(), true
}
