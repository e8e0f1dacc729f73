package kmsclient

import (
	"fmt"
	"strings"
)

// Class says what an error of a KMS means for its caller.
type Class int

// The classes, from the least to the most final.
const (
	// ClassUnavailable: the KMS was not reached, timed out, throttled the call or failed on its side. A retry may help.
	ClassUnavailable Class = iota
	// ClassDenied: the KMS refuses this caller: credentials, permission, quota in arrears, clock skew. An operator has to act.
	ClassDenied
	// ClassKeyUnusable: the key is disabled, pending deletion, pending import or not found. An operator has to act.
	ClassKeyUnusable
	// ClassInvalid: this request can never succeed: the ciphertext is not of this key, is damaged, or a parameter is wrong. A value whose
	// Decrypt fails like this is given up, so that a backend says so only of what the KMS says of the ciphertext.
	ClassInvalid
	// ClassContract: the KMS answered something that breaks the interface's contract (an empty key ID, an over-long blob, a refusal that is not known).
	ClassContract
)

// String returns the class as metrics and logs spell it.
func (c Class) String() string {
	switch c {
	case ClassUnavailable:
		return "unavailable"
	case ClassDenied:
		return "denied"
	case ClassKeyUnusable:
		return "key_unusable"
	case ClassInvalid:
		return "invalid"
	case ClassContract:
		return "contract"
	}
	return fmt.Sprintf("class(%d)", int(c))
}

// Error is a failed KMS operation. None of its fields ever holds a plaintext, a key, a token or a request's text: backends
// fill it from what is known to be safe and drop the rest.
type Error struct {
	Op         string // "Encrypt", "Decrypt", "Status", "GenerateDataKey"
	Provider   string // the provider's name in the configuration; filled by [New]'s wrapper
	Class      Class
	Code       string // the KMS' own error code, e.g. "Rejected.Disabled"; may be empty
	HTTPStatus int    // 0 when there was no HTTP answer
	RequestID  string // the KMS' own id of the request, to join with its audit log; may be empty
	KeyID      string // may be empty
	Detail     string // a safe explanation of our own; may be empty

	// Answered tells among errors of ClassUnavailable: the KMS did answer this call, and said nothing that one could go by. It may be about what was
	// asked, so it is tried once more, and is no sign that other calls would fail.
	Answered bool

	// Gone tells among errors of ClassKeyUnusable: the key or its material is not there any more, or is on its way out. Without it somebody
	// may have disabled the key to stop its use, and recovery copies of seeds must not get around that.
	Gone bool

	// Missing tells among those that are Gone: the KMS does not know the key at all, so that what it wrapped will never be unwrapped. A key that is
	// on its way out, or whose material may be imported again, is none.
	Missing bool

	// Alias tells among errors of ClassKeyUnusable, of other operations than Decrypt: the name that the key is called by leads to no key. Nothing
	// can be wrapped, and nothing is said of the keys that have wrapped.
	Alias bool
}

// Error implements error.
func (e *Error) Error() string {
	var b strings.Builder
	fmt.Fprintf(&b, "kms %s: %s", e.Op, strings.ReplaceAll(e.Class.String(), "_", " "))
	for _, f := range []struct{ name, value string }{
		{"provider", e.Provider}, {"code", e.Code}, {"key ID", e.KeyID}, {"request ID", e.RequestID},
	} {
		if f.value != "" {
			fmt.Fprintf(&b, ", %s %q", f.name, f.value)
		}
	}
	if e.HTTPStatus != 0 {
		fmt.Fprintf(&b, ", HTTP %d", e.HTTPStatus)
	}
	if e.Detail != "" {
		b.WriteString(": " + e.Detail)
	}
	return b.String()
}
