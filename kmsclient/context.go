package kmsclient

import (
	"context"
	"crypto/sha256"
	"errors"
)

// ErrOtherSecret is in the error of a Decrypt that returned another plaintext than [Expect]
// expects.
var ErrOtherSecret = errors.New("the KMS unwrapped another secret than it wrapped")

type (
	oneAttemptKey  struct{}
	pastCircuitKey struct{}
	expectKey      struct{}
	lengthKey      struct{}
)

// OneAttempt returns a context with which each operation of a [Client] makes one attempt at most.
func OneAttempt(ctx context.Context) context.Context {
	return context.WithValue(ctx, oneAttemptKey{}, true)
}

// PastCircuit returns a context for a health check: a [Client] makes the call even while the
// circuit is open, and closes the circuit if the call succeeds. Its caller limits how often it
// checks, and calls for stored values that opened the circuit must not delay the check.
func PastCircuit(ctx context.Context) context.Context {
	return context.WithValue(ctx, pastCircuitKey{}, true)
}

func isSet(ctx context.Context, key any) bool { return ctx.Value(key) != nil }

// Expect returns a context with which Decrypt of a [Client] fails, with an error of
// [BrokenContract] that wraps [ErrOtherSecret], unless the plaintext has this SHA-256 digest. So a
// wrong response is counted and recorded as one.
func Expect(ctx context.Context, digest [sha256.Size]byte) context.Context {
	return context.WithValue(ctx, expectKey{}, digest)
}

// ExpectLength returns a context with which Decrypt of a [Client] fails, with an error of
// [BrokenContract] and the text of check's, unless check accepts the length of the plaintext.
func ExpectLength(ctx context.Context, check func(n int) error) context.Context {
	return context.WithValue(ctx, lengthKey{}, check)
}

// checkExpected checks a plaintext against [Expect] and [ExpectLength], if they were used.
func checkExpected(ctx context.Context, plaintext []byte) error {
	if check, ok := ctx.Value(lengthKey{}).(func(n int) error); ok {
		if err := check(len(plaintext)); err != nil {
			return contract("a plaintext that cannot be a DEK seed: " + err.Error())
		}
	}
	if want, ok := ctx.Value(expectKey{}).([sha256.Size]byte); ok && sha256.Sum256(plaintext) != want {
		return WithCause(contract("another secret than it wrapped"), ErrOtherSecret)
	}
	return nil
}

// NotCalled reports whether an operation of a [Client] failed without a call, since the circuit is
// open.
func NotCalled(err error) bool { return errors.Is(err, errCircuitOpen) }
