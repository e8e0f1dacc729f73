package keyring

import (
	"errors"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// Answered reports whether every KMS that could unwrap the value's DEK seed answered the call, and
// refused or failed it without a reason that says whether that lasts. Many KMS plugins answer so
// for a damaged or foreign seed, and also while their own KMS is out of reach: [Sealer.Recheck]
// tells the two apart. It is false for an error that says what is wrong, and while a KMS does not
// answer.
func (e *Error) Answered() bool {
	switch e.Kind {
	case KeyUnusable, Corrupt, Plaintext, Refused:
		return false
	case Unavailable:
		return !e.silent && (e.answered || answered(e.Err))
	case SeedRefused: // a call without an answer has become one about the seed
		return !e.silent
	}
	return true // of a kind that is about the seed
}

// OfSeed returns what is wrong in words that are true of every value of the same DEK seed: it names
// no etcd key.
func (e *Error) OfSeed() string {
	if e.seed != "" {
		return e.seed
	}
	return e.Text
}

// answered reports whether a failed call was answered with nothing that one could go by: a fault
// that is not known, or what a KMS must not answer.
func answered(err error) bool {
	if _, ok := errors.AsType[*contractError](err); ok {
		return true
	}
	e, ok := errors.AsType[*kmsclient.Error](err)
	return ok && (e.Reason == kmsclient.BrokenContract || e.Reason.Answered())
}

// Recheck has the KMS of a stored value's provider contacted ahead of time, without waiting for it,
// and returns what is known of it so far: a LastGood after a refusal says that the KMS itself is
// well. ok is false if the rule has no KMS provider for the value.
func (s *Sealer) Recheck(stored []byte) (st State, ok bool) {
	provider, _, ok := envelope.Split(stored)
	if !ok {
		return State{}, false
	}
	r := s.ring(provider)
	if r == nil {
		return State{}, false
	}
	r.poke()
	return r.State(), true
}
