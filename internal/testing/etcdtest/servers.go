package etcdtest

import (
	"context"
	"fmt"
	"io"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdmodel"
)

// Member is one member of a cluster. Its database file is modelled: what a compaction has freed
// stays in it until the member is defragmented.
type Member struct {
	cluster  *Cluster
	index    int
	listener *bufconn.Listener

	// Under the cluster's mu.
	pending int64 // the compaction that the member has yet to carry out, and those before
	settled chan struct{}
	freed   int64 // up to which revision replaced values are freed
	absent  int64 // up to which they are no longer in the file
	defrags int
	lag     uint64
}

// Member returns a member.
func (c *Cluster) Member(i int) *Member { return c.members[i] }

// Defragmented returns how often the member was.
func (m *Member) Defragmented() int {
	m.cluster.mu.Lock()
	defer m.cluster.mu.Unlock()
	return m.defrags
}

// File returns the values that are in the member's database file, present or freed.
func (m *Member) File() (values []etcdmodel.Replaced) {
	m.cluster.mu.Lock()
	defer m.cluster.mu.Unlock()
	for _, v := range m.cluster.store.Values() {
		if v.By == 0 || v.By > m.absent {
			values = append(values, v)
		}
	}
	return values
}

// compactSoon has the member carry out a compaction in its own time. The cluster's mu is held.
func (m *Member) compactSoon(revision int64) {
	done := make(chan struct{})
	m.pending, m.settled = revision, done
	finish := func() {
		m.freed = max(m.freed, revision)
		close(done)
	}
	if m.cluster.CompactTime == 0 {
		finish()
		return
	}
	time.AfterFunc(m.cluster.CompactTime, func() {
		m.cluster.mu.Lock()
		defer m.cluster.mu.Unlock()
		finish()
	})
}

type kvServer struct {
	pb.UnimplementedKVServer
	*Member
}

func kv[A proto.Message](m *Member, ctx context.Context, r proto.Message) (A, error) {
	return answer(m, ctx, r, func() (A, error) {
		var none A
		a, err := m.cluster.Do(r)
		if err != nil {
			return none, err
		}
		typed, ok := a.(A)
		if !ok {
			return none, status.Errorf(codes.Internal, "an answer of type %T", a)
		}
		return typed, nil
	})
}

func (s *kvServer) Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	a, err := kv[*pb.RangeResponse](s.Member, ctx, r)
	if limit := s.cluster.PageBytes; err == nil && limit > 0 && len(a.GetKvs()) > 1 && proto.Size(a) > limit {
		return nil, status.Errorf(codes.ResourceExhausted, "grpc: received message larger than max (%d vs. %d)", proto.Size(a), limit)
	}
	return a, err
}

func (s *kvServer) Put(ctx context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
	return kv[*pb.PutResponse](s.Member, ctx, r)
}

func (s *kvServer) DeleteRange(ctx context.Context, r *pb.DeleteRangeRequest) (*pb.DeleteRangeResponse, error) {
	return kv[*pb.DeleteRangeResponse](s.Member, ctx, r)
}

func (s *kvServer) Txn(ctx context.Context, r *pb.TxnRequest) (*pb.TxnResponse, error) {
	return kv[*pb.TxnResponse](s.Member, ctx, r)
}

// Compact answers a physical compaction once the member has carried out all compactions so far.
func (s *kvServer) Compact(ctx context.Context, r *pb.CompactionRequest) (*pb.CompactionResponse, error) {
	a, err := kv[*pb.CompactionResponse](s.Member, ctx, r)
	s.cluster.mu.Lock()
	settled := s.settled
	s.cluster.mu.Unlock()
	if r.GetPhysical() && settled != nil {
		select {
		case <-settled:
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
	return a, err
}

type lease struct {
	ttl   time.Duration
	timer *time.Timer
}

type leaseServer struct {
	pb.UnimplementedLeaseServer
	*Member
}

func (s *leaseServer) LeaseGrant(ctx context.Context, r *pb.LeaseGrantRequest) (*pb.LeaseGrantResponse, error) {
	return answer(s.Member, ctx, r, func() (*pb.LeaseGrantResponse, error) {
		c := s.cluster
		c.mu.Lock()
		defer c.mu.Unlock()
		id := r.GetID()
		if id == 0 {
			c.nextLease++
			id = c.nextLease
		}
		if err := c.store.Grant(id); err != nil {
			return nil, err
		}
		ttl := time.Duration(r.GetTTL()) * time.Second
		// it may be revoked already
		c.leases[id] = &lease{ttl, time.AfterFunc(ttl, func() { _ = c.Revoke(id) })}
		return &pb.LeaseGrantResponse{Header: c.header(), ID: id, TTL: r.GetTTL()}, nil
	})
}

// Revoke ends a lease at once, as when it expires.
func (c *Cluster) Revoke(id int64) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if l := c.leases[id]; l != nil {
		l.timer.Stop()
		delete(c.leases, id)
	}
	err := c.store.Revoke(id)
	c.notify()
	return err
}

func (s *leaseServer) LeaseRevoke(ctx context.Context, r *pb.LeaseRevokeRequest) (*pb.LeaseRevokeResponse, error) {
	return answer(s.Member, ctx, r, func() (*pb.LeaseRevokeResponse, error) {
		if err := s.cluster.Revoke(r.GetID()); err != nil {
			return nil, err
		}
		s.cluster.mu.Lock()
		defer s.cluster.mu.Unlock()
		return &pb.LeaseRevokeResponse{Header: s.cluster.header()}, nil
	})
}

func (s *leaseServer) LeaseKeepAlive(stream pb.Lease_LeaseKeepAliveServer) error {
	return serve(s.Member, stream.Context(), stream.Recv, func(r *pb.LeaseKeepAliveRequest) error {
		a, err := answer(s.Member, stream.Context(), r, func() (*pb.LeaseKeepAliveResponse, error) {
			c := s.cluster
			c.mu.Lock()
			defer c.mu.Unlock()
			// of no time if there is no such lease
			a := &pb.LeaseKeepAliveResponse{Header: c.header(), ID: r.GetID()}
			if l := c.leases[r.GetID()]; l != nil && l.timer.Stop() {
				l.timer.Reset(l.ttl)
				a.TTL = int64(l.ttl / time.Second)
			}
			return a, nil
		})
		if err != nil {
			return err
		}
		return stream.Send(a)
	}, nil)
}

// serve handles the messages of a stream until it ends or is cut. idle, which may be nil, is called
// after each and after each change of what is stored.
func serve[R proto.Message](m *Member, ctx context.Context, receive func() (R, error), handle func(R) error, idle func() error) error {
	requests, failed := make(chan R), make(chan error, 1)
	go func() {
		for {
			r, err := receive()
			if err != nil {
				failed <- err
				return
			}
			select {
			case requests <- r:
			case <-ctx.Done():
				return
			}
		}
	}()
	for {
		m.cluster.mu.Lock()
		changed, cut := m.cluster.changed, m.cluster.cut
		m.cluster.mu.Unlock()
		if idle != nil {
			if err := idle(); err != nil {
				return err
			}
		}
		select {
		case r := <-requests:
			if err := handle(r); err != nil {
				return err
			}
		case <-changed:
		case <-ctx.Done(): // the receiver may have ended with a message in hand, and no error
			return status.FromContextError(ctx.Err()).Err()
		case <-cut:
			return status.Error(codes.Unavailable, "etcdserver: server stopped")
		case err := <-failed:
			if err == io.EOF { //nolint:errorlint // gRPC returns it as it is
				return nil
			}
			return err
		}
	}
}

type maintenanceServer struct {
	pb.UnimplementedMaintenanceServer
	*Member
}

func (m *Member) id() uint64 { return uint64(0xe0 + m.index) }

// SetLag has the member report that it is so many entries of the raft log behind.
func (m *Member) SetLag(entries uint64) {
	m.cluster.mu.Lock()
	defer m.cluster.mu.Unlock()
	m.lag = entries
}

func (s *maintenanceServer) Status(ctx context.Context, r *pb.StatusRequest) (*pb.StatusResponse, error) {
	return answer(s.Member, ctx, r, func() (*pb.StatusResponse, error) {
		size := int64(0)
		for _, v := range s.File() {
			size += int64(len(v.Value))
		}
		s.cluster.mu.Lock()
		defer s.cluster.mu.Unlock()
		h := s.cluster.header()
		h.MemberId = s.id()
		return &pb.StatusResponse{Header: h, Version: Version, DbSize: size, DbSizeInUse: size, Leader: s.cluster.members[0].id(), RaftAppliedIndex: 10_000 - s.lag}, nil
	})
}

func (s *maintenanceServer) Alarm(ctx context.Context, r *pb.AlarmRequest) (*pb.AlarmResponse, error) {
	return answer(s.Member, ctx, r, func() (*pb.AlarmResponse, error) { return &pb.AlarmResponse{}, nil })
}

func (s *maintenanceServer) Defragment(ctx context.Context, r *pb.DefragmentRequest) (*pb.DefragmentResponse, error) {
	return answer(s.Member, ctx, r, func() (*pb.DefragmentResponse, error) {
		s.cluster.mu.Lock()
		defer s.cluster.mu.Unlock()
		s.absent, s.defrags = s.freed, s.defrags+1
		return &pb.DefragmentResponse{}, nil
	})
}

type clusterServer struct {
	pb.UnimplementedClusterServer
	*Member
}

func (s *clusterServer) MemberList(ctx context.Context, r *pb.MemberListRequest) (*pb.MemberListResponse, error) {
	return answer(s.Member, ctx, r, func() (*pb.MemberListResponse, error) {
		s.cluster.mu.Lock()
		defer s.cluster.mu.Unlock()
		a := &pb.MemberListResponse{Header: s.cluster.header()}
		for _, m := range s.cluster.members {
			a.Members = append(a.Members, &pb.Member{ID: m.id(), Name: fmt.Sprintf("m%d", m.index), ClientURLs: []string{fmt.Sprintf("http://member%d:2379", m.index)}})
		}
		return a, nil
	})
}

// watch is one watch of a stream.
type watch struct {
	*pb.WatchCreateRequest
	id   int64
	next int64 // revision
}

type watchServer struct {
	pb.UnimplementedWatchServer
	*Member
}

// Watch responds as etcd does: events of one revision stay together, and progress is reported only
// once all watches of the stream have reached the revision.
func (s *watchServer) Watch(stream pb.Watch_WatchServer) error {
	var watches []*watch
	nextID := int64(0)
	send := func(id int64, a *pb.WatchResponse) error {
		s.cluster.mu.Lock()
		a.Header, a.WatchId = s.cluster.header(), id
		s.cluster.mu.Unlock()
		return stream.Send(a)
	}
	create := func(r *pb.WatchCreateRequest) error {
		w := &watch{r, nextID, r.GetStartRevision()}
		nextID++
		if w.next == 0 {
			w.next = s.cluster.Store().Rev() + 1
		}
		watches = append(watches, w)
		return send(w.id, &pb.WatchResponse{Created: true})
	}
	handle := func(r *pb.WatchRequest) error {
		if _, fault := s.intercept(stream.Context(), r); fault.Err != nil {
			return fault.Err
		}
		switch {
		case r.GetCreateRequest() != nil:
			return create(r.GetCreateRequest())
		case r.GetCancelRequest() != nil:
			for i, w := range watches {
				if w.id == r.GetCancelRequest().GetWatchId() {
					watches = append(watches[:i], watches[i+1:]...)
					return send(w.id, &pb.WatchResponse{Canceled: true})
				}
			}
		case r.GetProgressRequest() != nil:
			for _, w := range watches {
				if w.next != s.cluster.Store().Rev()+1 {
					return nil
				}
			}
			return send(-1, &pb.WatchResponse{})
		}
		return nil
	}
	idle := func() error {
		kept := watches[:0]
		for _, w := range watches {
			over, err := s.sendEvents(w, send)
			if err != nil {
				return err
			}
			if !over {
				kept = append(kept, w)
			}
		}
		watches = kept
		return nil
	}
	return serve(s.Member, stream.Context(), stream.Recv, handle, idle)
}

// sendEvents sends the events that a watch has not received. over says that it has ended.
func (s *watchServer) sendEvents(w *watch, send func(int64, *pb.WatchResponse) error) (over bool, err error) {
	store := s.cluster.Store()
	if w.next > store.Rev() {
		return false, nil
	}
	events, now, err := store.Events(w.GetKey(), w.GetRangeEnd(), w.next)
	if status.Code(err) == codes.OutOfRange && err == rpctypes.ErrGRPCCompacted { //nolint:errorlint // the model returns it as it is
		return true, send(w.id, &pb.WatchResponse{Canceled: true, CompactRevision: store.Compacted()})
	}
	if err != nil {
		return false, err
	}
	w.next = now + 1
	kept := events[:0]
	for _, e := range events {
		deleted := e.GetType() != 0
		filtered := false
		for _, f := range w.GetFilters() {
			filtered = filtered || f == pb.WatchCreateRequest_NODELETE && deleted || f == pb.WatchCreateRequest_NOPUT && !deleted
		}
		if !w.GetPrevKv() {
			e.PrevKv = nil
		}
		if !filtered {
			kept = append(kept, e)
		}
	}
	if len(kept) == 0 {
		return false, nil
	}
	return false, send(w.id, &pb.WatchResponse{Events: kept})
}
