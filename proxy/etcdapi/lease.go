package etcdapi

import (
	"context"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/valuetxn"
)

// revokeCall is a LeaseRevoke. It does not say which keys go with the lease, so etcd is requested
// them first: one to which keys of the proxies' own are attached stays. No client attaches them,
// since a put of such a key is refused; the proxies do, with the leases of their announcements,
// which LeaseLeases shows.
//
// The keys are requested with the client's own token. A client that may write the lease's keys and
// not read them is therefore refused by etcd.
type revokeCall struct {
	unread
	core    *Core
	queries bool
	lease   int64
}

func newRevokeCall(c *Core, _ *listener.Identity, _ *CallMemory) Call { return &revokeCall{core: c} }

func (c *revokeCall) Request(_ Mode, msg []byte) ([]byte, error) {
	if c.core.Rules.Load().Own.empty() {
		return msg, nil
	}
	var err error
	if c.lease, err = etcdwire.LeaseID(msg); err != nil {
		return nil, c.core.status(err, false)
	}
	c.queries = true
	return msg, nil
}

func (c *revokeCall) Exchanges() bool { return c.queries }

// exchange implements Exchanger. A key that the proxies attach between the two requests is of a
// proxy that has just begun, and tries again.
func (c *revokeCall) exchange(ctx context.Context, msg []byte, send sendFunc) ([]byte, error) {
	lease := new(pb.LeaseTimeToLiveResponse)
	request := &pb.LeaseTimeToLiveRequest{ID: c.lease, Keys: true}
	if err := c.core.query(ctx, send, pb.Lease_LeaseTimeToLive_FullMethodName, request, lease); err != nil {
		return nil, err
	}
	if slices.ContainsFunc(lease.GetKeys(), c.core.Rules.Load().Own.has) {
		return nil, errOwnLease
	}
	return send(ctx, pb.Lease_LeaseRevoke_FullMethodName, msg, valuetxn.MaxResponseBytes)
}
