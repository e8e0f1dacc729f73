package upstream

import (
	"context"
	"errors"
	"log/slog"
	"sync"
	"sync/atomic"

	"go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// lateAuth makes etcd's client library request a user's token with its first call, within the
// deadline of that call. By default the library does so in its constructor, which does not return
// before etcd responds: a proxy with a user would neither serve nor stop while etcd is down, and a
// command would exceed its --timeout.
type lateAuth struct {
	password func() string // the user's, as it is now; nil without a user
	log      *slog.Logger
	made     atomic.Bool // the constructor is through
	done     atomic.Bool // there is a token, or etcd needs none

	mu      sync.Mutex
	taken   string // the last password that etcd took; "" before
	refused string // the last that it did not
}

func (a *lateAuth) options() []grpc.DialOption {
	if a.password == nil {
		return nil
	}
	return []grpc.DialOption{grpc.WithChainUnaryInterceptor(a.unary)}
}

// unary is called by the library's own interceptor. If etcd reports that a call has no user, that
// interceptor gets a token and calls again.
func (a *lateAuth) unary(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	isAuth := method == etcdserverpb.Auth_Authenticate_FullMethodName
	switch {
	case isAuth && !a.made.Load():
		return rpctypes.ErrGRPCAuthNotEnabled
	case !isAuth && !a.done.Load() && method != healthpb.Health_Check_FullMethodName:
		// which needs no user
		return rpctypes.ErrGRPCUserEmpty
	}
	login, ok := req.(*etcdserverpb.AuthenticateRequest)
	if !ok {
		return invoke(ctx, method, req, reply, cc, opts...)
	}
	err := a.login(login, func() error { return invoke(ctx, method, login, reply, cc, opts...) })
	if isAuth && (err == nil || errors.Is(rpctypes.Error(err), rpctypes.ErrAuthNotEnabled)) {
		a.done.Store(true)
	}
	return err
}

// login calls with the password as it is now, and if etcd refuses that, with the last one that it
// took: a file may be changed before etcd's user is. The refusal is logged once.
func (a *lateAuth) login(req *etcdserverpb.AuthenticateRequest, call func() error) error {
	now := a.password()
	a.mu.Lock()
	taken := a.taken
	a.mu.Unlock()
	req.Password = now
	err := call()
	if errors.Is(rpctypes.Error(err), rpctypes.ErrAuthFailed) && taken != "" && taken != now {
		a.mu.Lock()
		again := a.refused == now
		a.refused = now
		a.mu.Unlock()
		if !again {
			a.log.Warn("etcd refuses the changed password; the last that it took is tried", "hint", "change the user's password in etcd, or correct etcd.passwordFile")
		}
		req.Password = taken
		return call()
	}
	if err == nil {
		a.mu.Lock()
		a.taken, a.refused = now, ""
		a.mu.Unlock()
	}
	return err
}
