package etcdapi

import (
	"context"

	"google.golang.org/grpc/codes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

// Sealer turns values of one rule into what etcd stores, and back. It is safe for concurrent use
// and retains no argument. key is the whole etcd key as the server stores it. An error that
// wraps [*SealError] decides the client's status; any other is answered as Internal with a fixed
// text.
type Sealer interface {
	// Seal appends to dst, which is not nil, the bytes to store in place of value. It returns nil
	// where the rule writes plaintext. dst does not overlap value.
	Seal(ctx context.Context, dst, key, value []byte) ([]byte, error)
	// Open appends to dst the value behind stored, the bytes etcd holds, or stored itself where the
	// rule hands it on. dst does not overlap stored. A value is not longer than what is stored.
	Open(ctx context.Context, dst, key, stored []byte) ([]byte, error)

	// TrySeal is Seal that never waits. The error wraps [ErrWouldBlock] if the value needs a KMS
	// call; any other error is final, as Seal's is.
	TrySeal(dst, key, value []byte) ([]byte, error)
	// TryOpen is Open that never waits. The error wraps [ErrWouldBlock] if the value needs a KMS
	// call.
	TryOpen(dst, key, stored []byte) ([]byte, error)
}

// ErrWouldBlock is what TrySeal and TryOpen of a [Sealer] return for a value that needs a KMS call.
var ErrWouldBlock = etcdwire.ErrWouldBlock

// Rule puts every key that begins with Prefix under a Sealer. The longest prefix wins; "" is every
// key.
type Rule struct {
	Prefix string
	Sealer Sealer
}

// SealError is a failure to encrypt or decrypt that the client may see. Text begins with what went
// wrong and never holds a value; the engine puts "etcd-kms-proxy: " before it.
type SealError struct {
	Code codes.Code // Unavailable, FailedPrecondition or DataLoss
	Text string
}

// Error implements error.
func (e *SealError) Error() string { return e.Text }
