package proxy

import (
	"context"
	"errors"
	"sync/atomic"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// lateAuth has etcd's client library ask for a user's token with its first call, within that call's time. By itself the library does so in its constructor, which
// does not come back before etcd answers: a proxy with a user would neither serve nor stop while etcd is down, and a command would outstay its --timeout.
type lateAuth struct {
	user bool
	made atomic.Bool // the constructor is through
	done atomic.Bool // there is a token, or etcd needs none
}

func (a *lateAuth) options() []grpc.DialOption {
	if !a.user {
		return nil
	}
	return []grpc.DialOption{grpc.WithChainUnaryInterceptor(a.unary)}
}

// unary stands behind the library's own interceptor. What that one does when etcd says that a call has no user is to fetch a token and to call again.
func (a *lateAuth) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	isAuth := method == etcdserverpb.Auth_Authenticate_FullMethodName
	switch {
	case isAuth && !a.made.Load():
		return rpctypes.ErrGRPCAuthNotEnabled
	case !isAuth && !a.done.Load() && method != healthpb.Health_Check_FullMethodName: // which needs no user
		return rpctypes.ErrGRPCUserEmpty
	}
	err := invoke(ctx, method, req, reply, cc, opts...)
	if isAuth && (err == nil || errors.Is(rpctypes.Error(err), rpctypes.ErrAuthNotEnabled)) {
		a.done.Store(true)
	}
	return err
}
