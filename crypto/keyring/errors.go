package keyring

import (
	"errors"
	"fmt"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// Kind says what a failed Seal or Open means for the client.
type Kind int

// The kinds.
const (
	// Unavailable: the KMS was not reached or its response was wrong. A retry may help; the value
	// is not the reason.
	Unavailable Kind = iota + 1
	// SeedRefused: the KMS unwraps other seeds, but not that of this value, and does not say why:
	// the value is damaged, or its key is disabled, gone or of another KMS. Most plugins answer so
	// whatever the reason is. An operator has to act. If the refusal lasts, see [Error.IsFinal].
	SeedRefused
	// KeyUnusable: the KMS key is disabled, pending deletion or gone, or the KMS refuses the proxy.
	// An operator has to act. If the key is gone for good, see [Error.IsFinal].
	KeyUnusable
	// Corrupt: the stored value is damaged, truncated, of another etcd key, or of another KMS key.
	// It cannot be decrypted later either.
	Corrupt
	// Plaintext: a stored value is plaintext or of a provider that the rule does not read, and the
	// rule is strict.
	Plaintext
	// Refused: the value cannot be written under this rule.
	Refused
)

// String returns the kind as metrics and logs spell it.
func (k Kind) String() string {
	names := [...]string{
		Unavailable: "unavailable", SeedRefused: "seed_refused", KeyUnusable: "key_unusable", Corrupt: "corrupt", Plaintext: "plaintext", Refused: "refused",
	}
	if k < Unavailable || int(k) >= len(names) {
		return fmt.Sprintf("kind(%d)", int(k))
	}
	return names[k]
}

// Error is a failed Seal or Open. Text may be shown to the client: it names the rule, the provider,
// the KMS key and request, and the etcd key where that matters, and never holds a value or a seed.
type Error struct {
	Kind Kind
	Text string
	Err  error // the cause, for errors.Is and errors.As; may be nil

	// lost is the provider of a value that cannot be decrypted later either, although it is not
	// Corrupt: its key is gone or has refused its seed for long, and there is no recovery copy.
	lost *provider
	// Of a seed with recovery copies, silent says that a KMS which might unwrap one did not answer,
	// and answered that one did. See [Error.Responded].
	silent, responded bool
	// seed is Text without the etcd key, as it is true of every value of the same DEK seed. "" if
	// that is Text.
	seed string
}

// ErrWouldBlock is the error of a value that needs a KMS call, or has to wait for one, where that
// is not allowed. See [Mode].
var ErrWouldBlock = &Error{Kind: Unavailable, Text: "a KMS call is needed"}

// Error implements error.
func (e *Error) Error() string { return e.Text }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// Responded reports whether every KMS that could unwrap the value's DEK seed answered the call with
// a failure that it did not explain. Many KMS plugins answer so for a damaged or foreign seed, and
// also while their own KMS is unreachable: another health check distinguishes the two. It is false
// for an error with a reason, and while a KMS does not answer.
func (e *Error) Responded() bool {
	switch e.Kind {
	case KeyUnusable, Corrupt, Plaintext, Refused:
		return false
	case Unavailable:
		return !e.silent && (e.responded || responded(e.Err))
	case SeedRefused: // a call without an answer has become one about the seed
		return !e.silent
	}
	return true // of a kind that is about the seed
}

// IsFinal reports whether the value cannot be decrypted later either: it is corrupt, or its key is
// gone or has refused its seed for long, and no recovery copy decrypts it.
func (e *Error) IsFinal() bool { return e.Kind == Corrupt || e.lost != nil }

// NoteReturned logs as an error that a value was returned as stored although its key is gone or has
// refused its seed for long. It logs this at most once an hour, and not for a corrupt value.
func (e *Error) NoteReturned() {
	if e.lost != nil {
		e.lost.noteLost(e)
	}
}

// InRule returns the error with the rule's prefix before its text.
func (e *Error) InRule(prefix string) *Error {
	named := *e
	named.Text = fmt.Sprintf("rule %q: %s", prefix, e.Text)
	return &named
}

// ofValue returns the error with the value's etcd key in its text, where that matters.
func (e *Error) ofValue(etcdKey []byte) *Error {
	named := *e // callers that waited for one unwrap share the error
	switch {
	case e.Responded():
		named.seed = e.Text
		named.Text = fmt.Sprintf("the stored value of etcd key %q was not decrypted: %s", Clip(etcdKey), e.Text)
	case e.Kind == Corrupt:
		named.Text = fmt.Sprintf("the stored value of etcd key %q is corrupt: %s", Clip(etcdKey), e.Text)
	}
	return &named
}

// OfSeed returns the text without the etcd key, so that it is true of every value of the same DEK
// seed.
func (e *Error) OfSeed() string {
	if e.seed != "" {
		return e.seed
	}
	return e.Text
}

// responded reports whether the KMS answered a failed call without a reason, or with a broken
// contract.
func responded(err error) bool {
	r := kmsclient.ReasonOf(err)
	return r == kmsclient.BrokenContract || r.Responded()
}

// kindOf returns the kind of a failed KMS call.
func kindOf(err error) Kind {
	if e, ok := errors.AsType[*recoveryError](err); ok {
		err = e.cause
	}
	switch kmsclient.ClassOf(err) {
	case kmsclient.ClassDenied, kmsclient.ClassKeyUnusable:
		return KeyUnusable
	default:
		return Unavailable
	}
}

// describe returns a text about a failed KMS call that is safe to show. The text of an error of
// another package than kmsclient and this one could hold a request.
func describe(err error) string {
	if e, ok := errors.AsType[*kmsclient.Error](err); ok {
		return e.Explain()
	}
	if own, ok := errors.AsType[*recoveryError](err); ok {
		return own.Error()
	}
	if own, ok := errors.AsType[*offlineError](err); ok {
		return own.Error()
	}
	return "the KMS call failed"
}

// brokenContract returns the error for a response in which this package found a broken contract.
func brokenContract(op, what string) error {
	return &kmsclient.Error{Op: op, Reason: kmsclient.BrokenContract, Detail: what}
}

// recoveryError says that no seed was generated because a required recovery provider did not wrap
// it. It hides the cause from errors.As: what another KMS says does not count for this ring's key.
type recoveryError struct {
	provider string
	cause    error
}

func (e *recoveryError) Error() string {
	return fmt.Sprintf("recovery provider %q, whose copy of the DEK seed is required, did not wrap it: %s", e.provider, describe(e.cause))
}

// Clip shortens a part of a stored value or a request for an error's text.
func Clip[T string | []byte](s T) string {
	if len(s) > 256 {
		return string(s[:256]) + "…"
	}
	return string(s)
}
