package differential

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/emptypb"
)

// everyMethod asks for each method that the descriptors of etcd's server name: the proxy must know it. The requests are empty, and their context has
// ended before the call can do anything.
func (b *bench) everyMethod(t *testing.T) {
	if b.proxy == nil {
		t.Skip("there is no proxy")
	}
	methods := 0
	for _, file := range []protoreflect.FileDescriptor{pb.File_rpc_proto, v3lockpb.File_v3lock_proto, v3electionpb.File_v3election_proto} {
		for i := range file.Services().Len() {
			s := file.Services().Get(i)
			for j := range s.Methods().Len() {
				methods++
				m := s.Methods().Get(j)
				full := fmt.Sprintf("/%s/%s", s.FullName(), m.Name())
				err := b.ask(t.Context(), full, m.IsStreamingClient() || m.IsStreamingServer())
				if text := status.Convert(err).Message(); strings.HasPrefix(text, "unknown service") || strings.HasPrefix(text, "unknown method") {
					t.Errorf("%s: %v", full, err)
				}
			}
		}
	}
	if methods < 45 {
		t.Errorf("only %d methods found: the test looks in the wrong place", methods)
	}
	if err := b.ask(t.Context(), "/v3lockpb.Lock/Steal", false); status.Convert(err).Message() != "unknown method Steal for service v3lockpb.Lock" {
		t.Errorf("a method that does not exist: %v", err)
	}
}

// ask calls a method with garbage that no version of etcd can decode, so that it does nothing.
func (b *bench) ask(ctx context.Context, full string, stream bool) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	request := new(emptypb.Empty)
	request.ProtoReflect().SetUnknown([]byte{0x0a, 0x05, 'x'}) // field 1, of five bytes, is cut off
	if !stream {
		return b.via.conn.Invoke(ctx, full, request, new(emptypb.Empty))
	}
	s, err := b.via.conn.NewStream(ctx, &grpc.StreamDesc{ClientStreams: true, ServerStreams: true}, full)
	if err != nil {
		return err
	}
	if err := s.SendMsg(request); err != nil {
		return err
	}
	if err := s.CloseSend(); err != nil {
		return err
	}
	return s.RecvMsg(new(emptypb.Empty))
}

// locks: etcd's own lock and election services work where no rule is, and are refused where one is.
func (b *bench) locks(t *testing.T) {
	if b.proxy == nil {
		t.Skip("etcd refuses nothing")
	}
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	defer cancel()
	lease, err := pb.NewLeaseClient(b.via.conn).LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: 600})
	if err != nil {
		t.Fatal(err)
	}
	lock, election := v3lockpb.NewLockClient(b.via.conn), v3electionpb.NewElectionClient(b.via.conn)
	refused := func(what string, err error) {
		t.Helper()
		if st := status.Convert(err); st.Code() != codes.Unimplemented || !strings.HasPrefix(st.Message(), "etcd-kms-proxy: ") {
			t.Errorf("%s under a rule: %v", what, err)
		}
	}
	_, err = lock.Lock(ctx, &v3lockpb.LockRequest{Name: []byte("/s/lock"), Lease: lease.ID})
	refused("lock", err)
	_, err = lock.Lock(ctx, &v3lockpb.LockRequest{Name: []byte("/s"), Lease: lease.ID})
	refused("lock whose keys are", err)
	_, err = election.Campaign(ctx, &v3electionpb.CampaignRequest{Name: []byte("/s/election"), Lease: lease.ID, Value: []byte(b.env.Sealed.Value("me"))})
	refused("campaign", err)
	_, err = election.Leader(ctx, &v3electionpb.LeaderRequest{Name: []byte("/s/election")})
	refused("leader", err)
	observed, err := election.Observe(ctx, &v3electionpb.LeaderRequest{Name: []byte("/s/election")})
	if err == nil {
		_, err = observed.Recv()
	}
	refused("observe", err)
	key := &v3electionpb.LeaderKey{Name: []byte("/s/election"), Key: []byte("/s/election/1"), Rev: 1, Lease: lease.ID}
	_, err = election.Proclaim(ctx, &v3electionpb.ProclaimRequest{Leader: key, Value: []byte(b.env.Sealed.Value("me"))})
	refused("proclaim", err)
	_, err = election.Resign(ctx, &v3electionpb.ResignRequest{Leader: key})
	refused("resign", err)

	held, err := lock.Lock(ctx, &v3lockpb.LockRequest{Name: []byte("/u/lock"), Lease: lease.ID})
	if err != nil || !strings.HasPrefix(string(held.GetKey()), "/u/lock/") {
		t.Fatalf("lock: %v, %v", held, err)
	}
	if _, err := lock.Unlock(ctx, &v3lockpb.UnlockRequest{Key: held.Key}); err != nil {
		t.Errorf("unlock: %v", err)
	}
	won, err := election.Campaign(ctx, &v3electionpb.CampaignRequest{Name: []byte("/u/election"), Lease: lease.ID, Value: []byte("me")})
	if err != nil {
		t.Fatalf("campaign: %v", err)
	}
	leader, err := election.Leader(ctx, &v3electionpb.LeaderRequest{Name: []byte("/u/election")})
	if err != nil || string(leader.GetKv().GetValue()) != "me" {
		t.Errorf("leader: %v, %v", leader, err)
	}
	if _, err := election.Resign(ctx, &v3electionpb.ResignRequest{Leader: won.Leader}); err != nil {
		t.Errorf("resign: %v", err)
	}
}
