package keyring

import (
	"errors"
	"fmt"
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// Kind says what a failed Seal or Open means for the client.
type Kind int

// The kinds.
const (
	// Unavailable: the KMS was not reached or did not answer as it must. A retry may help; nothing is wrong with the value.
	Unavailable Kind = iota + 1
	// SeedRefused: the KMS answers, and unwraps other seeds, and does not unwrap that of this
	// value, without saying why: the value is damaged, or its key is disabled, gone or not this
	// KMS'. Most plugins answer so whatever the reason is. An operator has to look; of a refusal
	// that lasts, [SealerConfig.Passthrough] takes values for lost.
	SeedRefused
	// KeyUnusable: the KMS key is disabled, pending deletion or gone, or the KMS refuses the proxy. An operator has to act. Of a key that is gone
	// for good, [SealerConfig.Passthrough] takes values for lost.
	KeyUnusable
	// Corrupt: the stored value is damaged, truncated, of another etcd key, or of a KMS key that is not this one. It will not open later either.
	Corrupt
	// Plaintext: a stored value is plaintext or of a provider that the rule does not read, and the rule is strict.
	Plaintext
	// Refused: the value cannot be written under this rule. See [SealerConfig.Write].
	Refused
)

// String returns the kind as metrics and logs spell it.
func (k Kind) String() string {
	switch k {
	case Unavailable:
		return "unavailable"
	case SeedRefused:
		return "seed_refused"
	case KeyUnusable:
		return "key_unusable"
	case Corrupt:
		return "corrupt"
	case Plaintext:
		return "plaintext"
	case Refused:
		return "refused"
	}
	return fmt.Sprintf("kind(%d)", int(k))
}

// Error is a failed Seal or Open. Text may be shown to the client: it names the rule, the provider, the KMS key and request, and the
// etcd key where that matters, and never holds a value or a seed.
type Error struct {
	Kind Kind
	Text string
	Err  error // the cause, for errors.Is and errors.As; may be nil

	// lost is the ring of a value that will not open later either, although it is not Corrupt: its
	// key is not there any more, or has refused it for long, and there is no copy.
	lost *Ring
	// Of a seed with recovery copies, silent says that a KMS which could still give it did not answer, and answered that one did. See [Error.Answered].
	silent, answered bool
	// seed is Text without the etcd key: what is true of every value of the same DEK seed. "" if that is Text.
	seed string
}

// ErrWouldBlock is returned by [Sealer.TrySeal] and [Sealer.TryOpen] when the value needs a KMS call, or has to wait for one.
var ErrWouldBlock = errors.New("a KMS call is needed")

// errWouldBlock is ErrWouldBlock inside of the package.
var errWouldBlock = &Error{Kind: Unavailable, Text: ErrWouldBlock.Error(), Err: ErrWouldBlock}

// Error implements error.
func (e *Error) Error() string { return e.Text }

// Unwrap returns the cause.
func (e *Error) Unwrap() error { return e.Err }

// kindOf returns the kind of a failed KMS call. An error of an unknown shape is Unavailable: it says nothing final.
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

// describe returns what may be said of a failed KMS call. Only a [kmsclient.Error] is safe to print; of any other error the text could
// hold a request.
func describe(err error) string {
	e, ok := errors.AsType[*kmsclient.Error](err)
	if !ok {
		if own, ok := errors.AsType[*contractError](err); ok {
			return own.Error()
		}
		if own, ok := errors.AsType[*recoveryError](err); ok {
			return own.Error()
		}
		return "the KMS call failed"
	}
	var b strings.Builder
	switch e.Class() {
	case kmsclient.ClassKeyUnusable:
		b.WriteString("the KMS key is disabled, pending deletion or gone")
	case kmsclient.ClassDenied:
		b.WriteString("the KMS denies access")
	case kmsclient.ClassInvalid:
		b.WriteString("the KMS does not accept the request")
	case kmsclient.ClassContract:
		b.WriteString("the KMS answered what it must not")
	default:
		b.WriteString("the KMS is unreachable, throttling or failing")
		if e.Reason.Answered() {
			b.Reset()
			b.WriteString("the KMS answers with a failure")
		}
	}
	fmt.Fprintf(&b, " (%s", e.Op)
	for _, f := range []struct{ name, value string }{{"code", e.Code}, {"key ID", e.KeyID}, {"request ID", e.RequestID}} {
		if f.value != "" {
			fmt.Fprintf(&b, ", %s %q", f.name, f.value)
		}
	}
	if e.HTTPStatus != 0 {
		fmt.Fprintf(&b, ", HTTP %d", e.HTTPStatus)
	}
	b.WriteString(")")
	if e.Detail != "" {
		b.WriteString(": " + e.Detail)
	}
	return b.String()
}

// contractError is an answer of the KMS that this package found to break the contract.
type contractError struct {
	op   string
	what string
}

func (e *contractError) Error() string {
	return fmt.Sprintf("the KMS answered what it must not (%s): %s", e.op, e.what)
}

// recoveryError is a seed that was not minted because a recovery provider that must have a copy did not wrap it. It hides the cause from
// errors.As: what another KMS says is nothing that this ring's key could be judged by.
type recoveryError struct {
	provider string
	cause    error
}

func (e *recoveryError) Error() string {
	return fmt.Sprintf("there must be a copy of the seed under recovery provider %q, which did not wrap it: %s", e.provider, describe(e.cause))
}
