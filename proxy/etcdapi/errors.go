package etcdapi

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

var (
	errReadOnly = rpc.Error(codes.PermissionDenied, "this client is one of the listener's ciphertextClients, which may only read")
	errOwnKey   = rpc.Error(codes.PermissionDenied, "this would change keys that the proxies keep for themselves: use keys with another prefix")
	errOwnLease = rpc.Error(codes.PermissionDenied, "keys that the proxies keep for themselves are attached to this lease")
	// ErrNoIdentity is the error for a request without an identity, which is a bug.
	ErrNoIdentity   = rpc.Error(codes.Internal, "connection without an identity")
	errSortedStream = rpc.Error(codes.Unimplemented, "a RangeStream does not sort by values under a rule: use Range")
	// ErrShuttingDown ends calls when the proxy drains.
	ErrShuttingDown = rpc.Error(codes.Unavailable, "shutting down")
	// errRequestTooLarge is etcd's own response, code and text.
	errRequestTooLarge = status.Error(codes.InvalidArgument, "etcdserver: request is too large")
)

// grpcError is an error that has a status for the client.
type grpcError interface {
	error
	GRPCStatus() *status.Status
}

// sealStatus maps the error of a Sealer or of the rewriter to the client's status. known is false
// if the cause is not one that a client should read: the status is then Internal with a fixed text,
// and the caller logs err.
func sealStatus(err error, fromEtcd bool) (st error, known bool) {
	if seal, ok := errors.AsType[*SealError](err); ok && seal.Code != codes.OK {
		return rpc.Error(seal.Code, seal.Text), true
	}
	if own, ok := errors.AsType[grpcError](err); ok {
		return own.GRPCStatus().Err(), true
	}
	switch {
	case errors.Is(err, etcdwire.ErrMalformed) && fromEtcd:
		return rpc.Error(codes.Internal, "etcd's answer: "+err.Error()), true
	case errors.Is(err, etcdwire.ErrMalformed):
		return rpc.Error(codes.InvalidArgument, err.Error()), true
	case errors.Is(err, etcdwire.ErrUnsupported):
		return rpc.Error(codes.Unimplemented, err.Error()), true
	case errors.Is(err, context.Canceled):
		return rpc.Error(codes.Canceled, context.Canceled.Error()), true
	case errors.Is(err, context.DeadlineExceeded):
		return rpc.Error(codes.DeadlineExceeded, context.DeadlineExceeded.Error()), true
	}
	return rpc.Error(codes.Internal, "a value could not be encrypted or decrypted"), false
}
