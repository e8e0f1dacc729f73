package keyring

import (
	"context"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

// ValueState compares a stored value with what its rule writes.
type ValueState string

// The states. A stale value is decrypted by a recovery copy, or is of another key ID, provider,
// type, format or set of recovery copies than a new one.
const (
	Current ValueState = "current" // as the rule writes it now
	Stale   ValueState = "stale"   // encrypted, but not as the rule writes it now
	// Unencrypted: plaintext; if the rule writes plaintext, that is Current
	Unencrypted ValueState = "plaintext"
	// Foreign: encrypted by a provider that the rule does not read
	Foreign       ValueState = "foreign"
	Undecryptable ValueState = "undecryptable" // cannot be decrypted; the error says why
)

// Inspect decrypts stored without the rule's policies, leaves it as it is, and returns its state.
// It compares with the key ID from the last Status. The plaintext of a foreign or unencrypted value
// is stored itself. The error is not nil exactly for Undecryptable; it is an [*Error].
func (s *Sealer) Inspect(ctx context.Context, key, stored []byte) ([]byte, ValueState, error) {
	plaintext, e, outcome, err := s.open(ctx, key, stored, openMode{})
	switch {
	case err != nil:
		return nil, Undecryptable, s.named(err)
	case outcome == OutcomeForeign:
		return plaintext, Foreign, nil
	case outcome == OutcomePlaintext && s.cfg.Write == nil:
		return plaintext, Current, nil
	case outcome == OutcomePlaintext:
		return plaintext, Unencrypted, nil
	case e == nil: // of another format
		return plaintext, Stale, nil
	case e.ring != s.cfg.Write || e.by != e.ring || e.typ != envelope.TypeSeed || e.keyID != e.ring.p.state.Load().keyID || !e.ring.copier.current(e.copies):
		return plaintext, Stale, nil
	}
	return plaintext, Current, nil
}

// Recheck starts a health check of a stored value's provider, does not wait for it, and returns the
// provider's state before: a LastGood after a refusal says that the KMS itself works. ok is false
// if the rule has no KMS provider for the value.
func (s *Sealer) Recheck(stored []byte) (st State, ok bool) {
	provider, _, ok := envelope.Split(stored)
	if !ok {
		return State{}, false
	}
	r := s.ring(provider)
	if r == nil {
		return State{}, false
	}
	r.p.wake()
	return r.State(), true
}
