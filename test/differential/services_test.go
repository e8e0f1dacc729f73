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
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// everyMethod calls each method in the descriptors of etcd's server: the proxy must have it. The
// requests are empty, and their context is canceled before the call can have an effect.
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

// ask calls a method with bytes that no version of etcd can decode, so that it has no effect.
func (b *bench) ask(ctx context.Context, full string, stream bool) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	request := new(emptypb.Empty)
	// field 1, of five bytes, is truncated
	request.ProtoReflect().SetUnknown([]byte{0x0a, 0x05, 'x'})
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

// TestElections checks that etcd's Lock and Election services respond in the same way with and
// without a rule.
func TestElections(t *testing.T) {
	t.Parallel()
	b := newBench(t, "3.7", ruleSets[1])
	for _, prefix := range []string{"/s/", "/u/"} {
		p := b.pair(t)
		p.reset(t.Context())
		want, got := b.elect(t, b.bare, prefix), b.elect(t, b.via, prefix)
		for i := range want {
			if i >= len(got) || got[i] != want[i] {
				t.Errorf("%s, step %d: the proxy: %s\nbare etcd: %s", prefix, i, got[min(i, len(got)-1)], want[i])
			}
		}
		t.Logf("%d steps", len(want))
		p.reset(t.Context())
	}
}

// elect calls both services, and returns their responses.
func (b *bench) elect(t *testing.T, s *side, prefix string) (answers []string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	note := func(answer any, err error) {
		if err != nil {
			st := status.Convert(err)
			answer = fmt.Sprintf("%v %q", st.Code(), st.Message())
		}
		// the texts of protobuf contain random spaces
		answers = append(answers, strings.ReplaceAll(fmt.Sprint(answer), "  ", " "))
	}
	set := b.env.Clear
	if b.rules.sealed(prefix + "x") {
		set = b.env.Sealed
	}
	leases, lock, election := pb.NewLeaseClient(s.conn), v3lockpb.NewLockClient(s.conn), v3electionpb.NewElectionClient(s.conn)
	for id := int64(701); id <= 702; id++ {
		note(leases.LeaseGrant(ctx, &pb.LeaseGrantRequest{ID: id, TTL: 600}))
	}
	soon := func() (context.Context, context.CancelFunc) { return context.WithTimeout(ctx, 300*time.Millisecond) }

	held, err := lock.Lock(ctx, &v3lockpb.LockRequest{Name: []byte(prefix + "lock"), Lease: 701})
	note(held, err)
	brief, stop := soon()
	_, err = lock.Lock(brief, &v3lockpb.LockRequest{Name: []byte(prefix + "lock"), Lease: 702})
	stop()
	// the code depends on who notices the deadline first, and on the version of etcd
	note(err != nil, nil)
	count := func(what string, n int64) {
		t.Helper()
		harness.Eventually(t, 10*time.Second, fmt.Sprintf("%d keys of the %s", n, what), func() error {
			r, err := s.kv.Range(ctx, &pb.RangeRequest{Key: []byte(prefix + what + "/"), RangeEnd: []byte(prefix + what + "0"), CountOnly: true})
			if err == nil && r.Count != n {
				err = fmt.Errorf("%d", r.Count)
			}
			return err
		})
	}
	count("lock", 1) // the call that gave up leaves the queue
	note(lock.Unlock(ctx, &v3lockpb.UnlockRequest{Key: held.GetKey()}))
	note(lock.Lock(ctx, &v3lockpb.LockRequest{Name: []byte(prefix + "lock"), Lease: 999}))

	name := []byte(prefix + "election")
	note(election.Leader(ctx, &v3electionpb.LeaderRequest{Name: name}))
	won, err := election.Campaign(ctx, &v3electionpb.CampaignRequest{Name: name, Lease: 701, Value: []byte(set.Value("one"))})
	note(won, err)
	note(election.Leader(ctx, &v3electionpb.LeaderRequest{Name: name}))
	observed, err := election.Observe(ctx, &v3electionpb.LeaderRequest{Name: name})
	if err != nil {
		t.Fatal(err)
	}
	note(observed.Recv())
	note(election.Proclaim(ctx, &v3electionpb.ProclaimRequest{Leader: won.GetLeader(), Value: []byte(set.Value("two"))}))
	note(observed.Recv())
	second := make(chan func(), 1)
	go func() {
		answer, err := election.Campaign(ctx, &v3electionpb.CampaignRequest{Name: name, Lease: 702, Value: []byte(set.Value("three"))})
		second <- func() { note(answer, err) }
	}()
	count("election", 2)
	note(election.Resign(ctx, &v3electionpb.ResignRequest{Leader: won.GetLeader()}))
	(<-second)()
	note(observed.Recv())
	note(election.Proclaim(ctx, &v3electionpb.ProclaimRequest{Leader: won.GetLeader(), Value: []byte(set.Value("late"))}))
	note(election.Proclaim(ctx, &v3electionpb.ProclaimRequest{}))
	note(election.Campaign(ctx, &v3electionpb.CampaignRequest{Name: name, Lease: 999, Value: []byte(set.Value("none"))}))
	return answers
}
