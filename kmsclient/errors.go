package kmsclient

import (
	"errors"
	"fmt"
	"strings"
)

// Reason says why a KMS operation failed.
type Reason int

// The reasons.
const (
	// Unreachable: the KMS was not reached, timed out or throttled the call. A retry may help.
	Unreachable Reason = iota
	// Failing: the KMS answered the call with a failure that it does not explain. The failure may
	// be about this request, so it is tried once more, and is no sign that other calls would fail.
	Failing
	// Unhealthy: Status was answered and said that the KMS is not healthy.
	Unhealthy
	// Denied: the KMS refuses this caller: credentials, permission, quota in arrears, clock skew.
	// An operator has to act.
	Denied
	// KeyDisabled: the key may not be used. An operator may have disabled it to stop its use, and
	// recovery copies of DEK seeds must not get around that.
	KeyDisabled
	// KeyGone: the key or its material is deleted, will be deleted, or waits for an import.
	KeyGone
	// KeyNotFound: the KMS does not have the key at all, so that what it wrapped will never be
	// unwrapped.
	KeyNotFound
	// AliasNotFound: the alias by which the key is configured leads to no key. Nothing can be
	// wrapped, and nothing is said of the keys that have wrapped. Decrypt never fails for it.
	AliasNotFound
	// Invalid: this request can never succeed: the ciphertext is damaged or of another key, or a
	// parameter is wrong. A value whose Decrypt fails for it counts as corrupt, so that a backend
	// uses it only for what the KMS says of the ciphertext.
	Invalid
	// BrokenContract: the answer breaks the interface's contract: an empty key ID, an oversized
	// ciphertext, an unknown refusal.
	BrokenContract
	// Prevented: the KMS was not called, for a reason in Detail that is not its own.
	Prevented
)

// String returns the reason in snake case.
func (r Reason) String() string {
	names := [...]string{
		"unreachable", "failing", "unhealthy", "denied", "key_disabled", "key_gone", "key_not_found", "alias_not_found", "invalid", "broken_contract", "prevented",
	}
	if r < 0 || int(r) >= len(names) {
		return fmt.Sprintf("reason(%d)", int(r))
	}
	return names[r]
}

// Class returns what the reason means for the caller.
func (r Reason) Class() Class {
	switch r {
	case Denied:
		return ClassDenied
	case KeyDisabled, KeyGone, KeyNotFound, AliasNotFound:
		return ClassKeyUnusable
	case Invalid:
		return ClassInvalid
	case BrokenContract:
		return ClassContract
	}
	return ClassUnavailable
}

// Responded reports whether the KMS is unavailable although it answered.
func (r Reason) Responded() bool { return r == Failing || r == Unhealthy }

// Gone reports whether the key cannot be used because it is not there, or will not be, and not
// because an operator has disabled it.
func (r Reason) Gone() bool { return r == KeyGone || r == KeyNotFound || r == AliasNotFound }

// ReasonOf returns the reason in err. An error without one is Unreachable: it says nothing final.
func ReasonOf(err error) Reason {
	if e, ok := errors.AsType[*Error](err); ok {
		return e.Reason
	}
	return Unreachable
}

// ClassOf returns the class of the reason in err.
func ClassOf(err error) Class { return ReasonOf(err).Class() }

// Class groups reasons by what they mean for the caller. Metrics and audit records have it.
type Class string

// The classes.
const (
	ClassUnavailable Class = "unavailable"  // a retry may help
	ClassDenied      Class = "denied"       // the caller is refused
	ClassKeyUnusable Class = "key_unusable" // the key may not be used, or is not there
	ClassInvalid     Class = "invalid"      // the request can never succeed
	ClassContract    Class = "contract"     // the answer is not what it must be
)

// Error is a failed KMS operation. None of its fields ever holds a plaintext, a key, a token or a
// request's text: backends fill it from what is safe and leave out the rest.
type Error struct {
	Op         string // "Encrypt", "Decrypt", "Status", "GenerateDataKey"
	Provider   string // the provider's name in the configuration; filled by [New]'s wrapper
	Reason     Reason
	Code       string // the KMS' own error code, e.g. "Rejected.Disabled"; may be empty
	HTTPStatus int    // 0 when there was no HTTP answer
	RequestID  string // the KMS' own id of the request, to join with its audit log; may be empty
	KeyID      string // may be empty
	Detail     string // a safe explanation of our own; may be empty
}

// Class returns the class of the reason.
func (e *Error) Class() Class { return e.Reason.Class() }

// Error implements error.
func (e *Error) Error() string {
	text := fmt.Sprintf("kms %s: %s", e.Op, strings.ReplaceAll(string(e.Class()), "_", " "))
	if e.Provider != "" {
		text += fmt.Sprintf(", provider %q", e.Provider)
	}
	return e.withDetail(text + e.fields())
}

// Explain returns the error as a sentence for those who know the provider, such as the text of an
// error that a client of the proxy gets.
func (e *Error) Explain() string {
	if e.Reason == Prevented {
		return "the KMS was not called: " + e.Detail
	}
	text := "the KMS is unreachable, throttling or failing"
	switch {
	case e.Class() == ClassKeyUnusable:
		text = "the KMS key is disabled, pending deletion or gone"
	case e.Class() == ClassDenied:
		text = "the KMS denies access"
	case e.Class() == ClassInvalid:
		text = "the KMS does not accept the request"
	case e.Class() == ClassContract:
		text = "the response of the KMS is wrong"
	case e.Reason.Responded():
		text = "the KMS answers with a failure"
	}
	return e.withDetail(text + " (" + e.Op + e.fields() + ")")
}

// fields returns what identifies the failed request, each field after a comma.
func (e *Error) fields() string {
	text := ""
	for _, f := range []struct{ name, value string }{{"code", e.Code}, {"key ID", e.KeyID}, {"request ID", e.RequestID}} {
		if f.value != "" {
			text += fmt.Sprintf(", %s %q", f.name, f.value)
		}
	}
	if e.HTTPStatus != 0 {
		text += fmt.Sprintf(", HTTP %d", e.HTTPStatus)
	}
	return text
}

func (e *Error) withDetail(text string) string {
	if e.Detail == "" {
		return text
	}
	return text + ": " + e.Detail
}
