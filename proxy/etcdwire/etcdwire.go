// Package etcdwire rewrites the values inside etcdserverpb messages on the wire.
//
// It edits bytes and never rebuilds a message: unknown fields and everything outside a changed
// value stay as they came. It does no I/O and knows nothing of gRPC, rules or keys: it calls a
// [Rules]. Messages are read only. A request without a change is returned as the very slice that
// was passed in; any other request, and a response, is written to the end of a buffer of the
// caller.
package etcdwire

import "errors"

// Rules encrypts and decrypts values, and reports which keys have a rule. Implementations are safe
// for concurrent use and do not retain arguments.
type Rules interface {
	// Overlaps reports whether a rule covers key (rangeEnd empty) or any key of [key, rangeEnd).
	// rangeEnd "\x00" is every key from key on.
	Overlaps(key, rangeEnd []byte) bool
	// Covers reports whether Seal may change the value of key, or refuse it.
	Covers(key []byte) bool
	// Seal appends to dst, which is not nil, the bytes to store for value. It returns nil for a
	// value that stays as it is. dst does not overlap value.
	Seal(dst, key, value []byte) ([]byte, error)
	// Open appends to dst the value behind the stored bytes. For a key under no rule it appends
	// stored itself. dst does not overlap stored.
	Open(dst, key, stored []byte) ([]byte, error)
}

var (
	// ErrMalformed is wrapped by the error for a message that cannot be decoded, or that says one
	// thing twice.
	ErrMalformed = errors.New("malformed message")
	// ErrUnsupported is wrapped by the error for a request that cannot be served on encrypted
	// values.
	ErrUnsupported = errors.New("unsupported on keys under a rule")
	// ErrByValue is wrapped by the error for a request that compares or sorts by values under a
	// rule, which etcd itself cannot do: it has ciphertexts.
	ErrByValue = errors.New("by value, on keys under a rule")
	// ErrWouldBlock is wrapped by the error of Rules that would have to wait.
	ErrWouldBlock = errors.New("a KMS call is needed")
	// ErrValueProvided is the error for a put under a rule that is to keep its value, and has one:
	// etcd would refuse it.
	ErrValueProvided = errors.New("a put is to keep its value, and has one")
)
