package proxy

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

var (
	errReadOnly     = ownError(codes.PermissionDenied, "this client is one of the listener's ciphertextClients, which may only read")
	errOwnKey       = ownError(codes.PermissionDenied, "this would change keys that the proxies keep for themselves: use keys with another prefix")
	errOwnLease     = ownError(codes.PermissionDenied, "keys that the proxies keep for themselves are attached to this lease")
	errNoIdentity   = ownError(codes.Internal, "connection without an identity")
	errSortedStream = ownError(codes.Unimplemented, "a RangeStream does not sort by values under a rule: use Range")
	errShuttingDown = ownError(codes.Unavailable, "shutting down")
	// errRequestTooLarge is etcd's own answer, code and text.
	errRequestTooLarge = status.Error(codes.InvalidArgument, "etcdserver: request is too large")
)

// sealStatus maps what a Sealer or the rewriter said to the client's status. known is false if the cause is not one that a client
// should read: the status is then Internal with a fixed text, and the caller logs err.
func sealStatus(err error, fromEtcd bool) (st error, known bool) {
	var seal *SealError
	if errors.As(err, &seal) && seal.Code != codes.OK {
		return ownError(seal.Code, seal.Text), true
	}
	var own interface{ GRPCStatus() *status.Status }
	switch {
	case errors.As(err, &own):
		return own.GRPCStatus().Err(), true
	case errors.Is(err, etcdwire.ErrMalformed) && fromEtcd:
		return ownError(codes.Internal, "etcd's answer: "+err.Error()), true
	case errors.Is(err, etcdwire.ErrMalformed):
		return ownError(codes.InvalidArgument, err.Error()), true
	case errors.Is(err, etcdwire.ErrUnsupported):
		return ownError(codes.Unimplemented, err.Error()), true
	case errors.Is(err, context.Canceled):
		return ownError(codes.Canceled, context.Canceled.Error()), true
	case errors.Is(err, context.DeadlineExceeded):
		return ownError(codes.DeadlineExceeded, context.DeadlineExceeded.Error()), true
	}
	return ownError(codes.Internal, "a value could not be sealed or opened"), false
}
