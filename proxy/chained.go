package proxy

import (
	"context"
	"errors"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// Two proxies in a row would seal twice, and a command that works on what is stored would take opened values for plaintext. So every request that a proxy or a
// command sends towards etcd says in its metadata that it is meant for etcd, which passes over it, and a proxy refuses such a request. Who does not send it, which is
// every client of etcd, is not told a proxy from etcd by it.
const meantForEtcd = "etcd-kms-proxy-meant-for"

var markOfEtcd = []string{"etcd"}

var errChained = ownError(codes.FailedPrecondition, "etcd.endpoints leads to a proxy: name etcd itself")

// refuseChained refuses what another proxy or a command has sent.
func refuseChained(ctx context.Context) error {
	if len(metadata.ValueFromIncomingContext(ctx, meantForEtcd)) > 0 {
		return errChained
	}
	return nil
}

// IsChained reports whether err is the answer of a proxy, not of etcd, to a request of [NewClient]'s.
func IsChained(err error) bool {
	var st interface{ GRPCStatus() *status.Status }
	return errors.As(err, &st) && st.GRPCStatus().Message() == status.Convert(errChained).Message()
}

// forEtcd marks every request of a client connection.
func forEtcd() []grpc.DialOption {
	return []grpc.DialOption{
		grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
			return invoke(metadata.AppendToOutgoingContext(ctx, meantForEtcd, markOfEtcd[0]), method, req, reply, cc, opts...)
		}),
		grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, stream grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
			return stream(metadata.AppendToOutgoingContext(ctx, meantForEtcd, markOfEtcd[0]), desc, cc, method, opts...)
		}),
	}
}
