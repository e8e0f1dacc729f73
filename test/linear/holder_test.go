package linear

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// ttl is the shortest that etcd grants with its default election timeout, in seconds.
const ttl = 2

var errGone = errors.New("the key is not there any more")

// holder is a client that has keys for as long as it keeps a lease alive.
type holder struct {
	*site
	*history
	kv      pb.KVClient // through a proxy
	library *clientv3.Client
	locks   v3lockpb.LockClient
	votes   v3electionpb.ElectionClient
	id, n   int
	around  bool // the library and the services bypass the proxies

	turns, refusals atomic.Int32

	leaseKey string // another key of the lease
	revoked  bool   // a key of the lease says nothing about the other one
	token    int64
	mu       sync.Mutex
	wrongs   []string
}

func (s *site) holder(t *testing.T, h *history, id, via int) *holder {
	t.Helper()
	address := s.reach(via)
	conn := harness.Dial(t, address, nil)
	c := &holder{
		site: s, history: h, id: id, around: via == direct, library: library(t, "http://"+address),
		kv: pb.NewKVClient(conn), locks: v3lockpb.NewLockClient(conn), votes: v3electionpb.NewElectionClient(conn),
	}
	if c.around {
		c.kv = pb.NewKVClient(harness.Dial(t, s.reach(id%2), nil))
	}
	return c
}

// session starts a lease that is kept alive until end, with a key that shows whether it exists. It
// returns nil if that failed.
func (c *holder) session(ctx context.Context) (clientv3.LeaseID, *concurrency.Session, func()) {
	asking, cancel := answer(ctx)
	defer cancel()
	lease, err := c.library.Grant(asking, ttl)
	if err != nil {
		return 0, nil, nil
	}
	c.revoked, c.leaseKey = false, fmt.Sprintf("/s/witness/%x", lease.ID)
	_, err = c.kv.Put(asking, &pb.PutRequest{Key: []byte(c.leaseKey), Value: []byte(c.Sealed.Value("witness")), Lease: int64(lease.ID)})
	if err != nil {
		_ = c.revoke(ctx, lease.ID) // or it expires
		return 0, nil, nil
	}
	session, err := concurrency.NewSession(c.library, concurrency.WithLease(lease.ID), concurrency.WithContext(ctx))
	if err != nil {
		return 0, nil, nil
	}
	return lease.ID, session, func() {
		session.Orphan()
		_ = c.revoke(ctx, lease.ID) // so that nobody waits for it to expire
	}
}

// revoke ends a lease, without the networks that fail for clients.
func (c *holder) revoke(ctx context.Context, lease clientv3.LeaseID) (err error) {
	for range 5 {
		asking, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		_, err = c.etcd.Revoke(asking, lease)
		cancel()
		if err == nil || errors.Is(err, rpctypes.ErrLeaseNotFound) {
			return nil
		}
	}
	return err
}

// wrong records what fails the test.
func (c *holder) wrong(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wrongs = append(c.wrongs, fmt.Sprintf(format, args...))
}

func (c *holder) judge(t *testing.T) {
	t.Helper()
	for _, w := range c.wrongs {
		t.Error(w)
	}
}
