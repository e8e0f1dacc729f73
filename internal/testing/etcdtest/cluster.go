// Package etcdtest is a test double of an etcd cluster, in memory, for tests of the packages under
// lifecycle. Real clients of etcd connect to it over gRPC without a network, so that it runs inside
// a bubble of testing/synctest. Its store is that of package etcdmodel; leases, watches, compaction
// and defragmentation of each member, and restores are added here.
//
// [Sealer] is the double of a rule's sealer.
//
// A test puts faults between the requests: see [Cluster.Intercept].
package etcdtest

import (
	"context"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdmodel"
)

// MaxTxnOps is the limit of the cluster on the operations of a transaction, etcd's default.
const MaxTxnOps = 128

// Version is the version of etcd that the members report.
const Version = "3.7.3"

// Call is one request that a client has sent, or one message of a stream of keepalives or watches.
type Call struct {
	Client  string // the name given to [Cluster.Client]
	Member  int
	Request proto.Message
}

// Fault is what becomes of a call. The zero value is that it is answered.
type Fault struct {
	// Err is the error that the client gets instead of the answer. A stream ends with it.
	Err error
	// Applied says that the request was carried out all the same.
	Applied bool
}

// Cluster is an etcd cluster in memory. It is safe for concurrent use.
type Cluster struct {
	// Intercept is called with each request before it is carried out, without a lock: it may use
	// the cluster. May be nil. It is set before clients connect.
	Intercept func(*Call) Fault
	// Done is called after each request that was carried out, with its answer. May be nil.
	Done func(*Call, proto.Message)
	// CompactTime is how long a member takes to carry out a compaction in its own file.
	CompactTime time.Duration
	// PageBytes is how many bytes of pairs a response to a range request holds at most; more are
	// refused as by gRPC. 0 is any.
	PageBytes int

	members []*Member

	mu        sync.Mutex
	store     *etcdmodel.Store
	clusterID uint64
	term      uint64
	leases    map[int64]*lease
	nextLease int64
	changed   chan struct{} // closed at each change
	cut       chan struct{} // closed to end all streams
}

// New starts a cluster of so many members, which ends with the test. The first is the leader.
func New(t testing.TB, members int) *Cluster {
	c := &Cluster{
		store: etcdmodel.New(MaxTxnOps), clusterID: 7, term: 2, leases: make(map[int64]*lease), nextLease: 1000,
		changed: make(chan struct{}), cut: make(chan struct{}),
	}
	for i := range members {
		m := &Member{cluster: c, index: i, listener: bufconn.Listen(64 << 10)}
		c.members = append(c.members, m)
		s := grpc.NewServer(grpc.MaxRecvMsgSize(64 << 20))
		pb.RegisterKVServer(s, &kvServer{Member: m})
		pb.RegisterLeaseServer(s, &leaseServer{Member: m})
		pb.RegisterWatchServer(s, &watchServer{Member: m})
		pb.RegisterMaintenanceServer(s, &maintenanceServer{Member: m})
		pb.RegisterClusterServer(s, &clusterServer{Member: m})
		go func() { _ = s.Serve(m.listener) }() // it ends with the test
		t.Cleanup(s.Stop)
	}
	t.Cleanup(func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		for _, l := range c.leases {
			l.timer.Stop()
		}
	})
	return c
}

// Client connects a client, which ends with the test. Its name is [Call.Client].
func (c *Cluster) Client(t testing.TB, name string) *clientv3.Client {
	endpoints := make([]string, 0, len(c.members))
	for i := range c.members {
		endpoints = append(endpoints, fmt.Sprintf("http://member%d:2379", i))
	}
	return c.ClientOf(t, name, endpoints...)
}

// ClientOf connects a client to some endpoints.
func (c *Cluster) ClientOf(t testing.TB, name string, endpoints ...string) *clientv3.Client {
	named := func(ctx context.Context) context.Context { return metadata.AppendToOutgoingContext(ctx, "name", name) }
	client, err := clientv3.New(clientv3.Config{
		Endpoints: endpoints, Logger: zap.NewNop(),
		DialOptions: []grpc.DialOption{
			grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(c.dial),
			grpc.WithChainUnaryInterceptor(func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
				return invoke(named(ctx), method, req, reply, cc, opts...)
			}),
			grpc.WithChainStreamInterceptor(func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
				return open(named(ctx), desc, cc, method, opts...)
			}),
		},
	})
	if err != nil {
		t.Fatal(err)
	}
	client.Watcher = newWatcher(pb.NewWatchClient(client.ActiveConnection()))
	t.Cleanup(func() { _ = client.Close() }) // it reports the end of its own context
	return client
}

func (c *Cluster) dial(ctx context.Context, address string) (net.Conn, error) {
	var i int
	if _, err := fmt.Sscanf(address, "member%d:2379", &i); err != nil || i >= len(c.members) {
		return nil, fmt.Errorf("no member at %q", address)
	}
	return c.members[i].listener.DialContext(ctx)
}

// Do carries out a request of the KV service as a client without faults.
func (c *Cluster) Do(request proto.Message) (proto.Message, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.do(request)
}

// do is Do with mu held.
func (c *Cluster) do(request proto.Message) (proto.Message, error) {
	answer, err := c.store.Do(request)
	c.notify()
	if r, ok := request.(*pb.CompactionRequest); ok && err == nil {
		for _, m := range c.members {
			m.compactSoon(r.GetRevision())
		}
	}
	if h, ok := answer.(interface{ GetHeader() *pb.ResponseHeader }); ok && err == nil && h.GetHeader() != nil {
		h.GetHeader().ClusterId, h.GetHeader().RaftTerm = c.clusterID, c.term
	}
	return answer, err
}

// notify wakes up the watches. mu is held.
func (c *Cluster) notify() {
	close(c.changed)
	c.changed = make(chan struct{})
}

// Store returns what is stored.
func (c *Cluster) Store() *etcdmodel.Store {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.store
}

// Put stores a value, and returns its revision.
func (c *Cluster) Put(key, value string) int64 {
	_, err := c.Do(&pb.PutRequest{Key: []byte(key), Value: []byte(value)})
	if err != nil {
		panic(err) // the request is of the test
	}
	return c.Store().Rev()
}

// Delete deletes a key.
func (c *Cluster) Delete(key string) {
	if _, err := c.Do(&pb.DeleteRangeRequest{Key: []byte(key)}); err != nil {
		panic(err) // the request is of the test
	}
}

// Compact compacts at a revision; 0 is the present one.
func (c *Cluster) Compact(revision int64) {
	if revision == 0 {
		revision = c.Store().Rev()
	}
	_, _ = c.Do(&pb.CompactionRequest{Revision: revision}) // it may be compacted already
}

// Cut ends all streams, as a restart of etcd does.
func (c *Cluster) Cut() {
	c.mu.Lock()
	defer c.mu.Unlock()
	close(c.cut)
	c.cut = make(chan struct{})
}

// Restore replaces what is stored by an older copy, as a restore from a snapshot does: the cluster
// is another one, its leases are gone unless they were in the copy, and all streams end.
func (c *Cluster) Restore(old *etcdmodel.Store) {
	c.mu.Lock()
	c.store, c.clusterID, c.term = old.Clone(), c.clusterID+1, 2
	for id, l := range c.leases {
		l.timer.Stop()
		delete(c.leases, id)
	}
	c.mu.Unlock()
	c.Cut()
}

// header is that of an answer, for all but the KV service. mu is held.
func (c *Cluster) header() *pb.ResponseHeader {
	return &pb.ResponseHeader{ClusterId: c.clusterID, RaftTerm: c.term, Revision: c.store.Rev()}
}

// intercept says what becomes of a request.
func (m *Member) intercept(ctx context.Context, request proto.Message) (*Call, Fault) {
	call := &Call{Member: m.index, Request: request}
	if md, ok := metadata.FromIncomingContext(ctx); ok && len(md.Get("name")) > 0 {
		call.Client = md.Get("name")[0]
	}
	if m.cluster.Intercept == nil {
		return call, Fault{}
	}
	return call, m.cluster.Intercept(call)
}

// answer carries out one request unless a fault keeps it from that.
func answer[A proto.Message](m *Member, ctx context.Context, request proto.Message, do func() (A, error)) (A, error) {
	var none A
	call, fault := m.intercept(ctx, request)
	if fault.Err != nil && !fault.Applied {
		return none, fault.Err
	}
	a, err := do()
	if err == nil && m.cluster.Done != nil {
		m.cluster.Done(call, a)
	}
	if fault.Err != nil {
		return none, fault.Err
	}
	return a, err
}
