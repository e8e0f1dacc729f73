package differential

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// step is one call of a method with its response.
type step struct {
	method          string // without the package of the service; etcdserverpb if there is none
	request, answer proto.Message
	// differ lists the fields of the response that differ between any two servers.
	differ []protoreflect.Name
}

// TestEveryMethod calls each method of each service, on every available version of etcd, with every
// key encrypted, and compares the responses. The table of methods in docs/design/compatibility.md
// is based on it.
func TestEveryMethod(t *testing.T) {
	t.Parallel()
	for _, version := range harness.Versions(t) {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			b := newBench(t, version, ruleSets[0])
			b.tells(t)
			m := &methods{bench: b, t: t}
			for _, s := range m.script() {
				m.unary(t.Context(), s)
			}
			m.streams()
			m.elections()
			m.guarded()
		})
	}
}

// methods runs the test for one version.
type methods struct {
	*bench
	t *testing.T
}

func full(method string) string {
	if strings.Contains(method, ".") {
		return "/" + method
	}
	return "/etcdserverpb." + method
}

func (m *methods) sides() []*side { return []*side{m.bare, m.via} }

// note records a method as tested if both sides ended in the same way.
func (m *methods) note(method string, ends []error, texts []string) {
	m.t.Helper()
	a, b := status.Convert(ends[0]), status.Convert(ends[1])
	if !proto.Equal(a.Proto(), b.Proto()) || texts[0] != texts[1] {
		m.t.Errorf("%s\nbare etcd: %v, %s\nthe proxy: %v, %s", method, ends[0], texts[0], ends[1], texts[1])
		return
	}
	m.tested[full(method)] = m.tested[full(method)] || a.Code() != codes.Unimplemented
}

func (m *methods) unary(ctx context.Context, s step) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	var ends []error
	var texts []string
	for _, side := range m.sides() {
		answer := proto.Clone(s.answer)
		ends = append(ends, side.conn.Invoke(ctx, full(s.method), s.request, answer))
		texts = append(texts, alike(answer, s.differ))
	}
	m.note(s.method, ends, texts)
}

// alike prints a response without the fields that differ between servers.
func alike(answer proto.Message, differ []protoreflect.Name) string {
	r := answer.ProtoReflect()
	for _, name := range append(differ, "raft_term") {
		if f := r.Descriptor().Fields().ByName(name); f != nil {
			r.Clear(f)
		}
	}
	if f := r.Descriptor().Fields().ByName("header"); f != nil && r.Has(f) {
		if h, ok := r.Mutable(f).Message().Interface().(*pb.ResponseHeader); ok {
			h.RaftTerm = 0
		}
	}
	// the texts of protobuf contain random spaces
	return strings.Join(strings.Fields(text(answer)), " ")
}

func (m *methods) script() []step {
	secret := func(s string) []byte { return []byte(m.env.Sealed.Value(s)) }
	key, end := []byte("/s/k"), []byte("/s/l")
	member := []protoreflect.Name{"members", "member"}
	return []step{
		{"KV/Put", &pb.PutRequest{Key: key, Value: secret("a")}, &pb.PutResponse{}, nil},
		{"KV/Put", &pb.PutRequest{Key: key, Value: secret("b"), PrevKv: true}, &pb.PutResponse{}, nil},
		{"KV/Range", &pb.RangeRequest{Key: key, RangeEnd: end}, &pb.RangeResponse{}, nil},
		{"KV/Range", &pb.RangeRequest{Key: key, RangeEnd: end, SortTarget: pb.RangeRequest_VALUE, SortOrder: pb.RangeRequest_DESCEND}, &pb.RangeResponse{}, nil},
		{"KV/Txn", &pb.TxnRequest{
			Compare: []*pb.Compare{{Key: key, Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: secret("b")}}},
			Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("/s/k2"), Value: secret("c")}}}},
		}, &pb.TxnResponse{}, nil},
		{"KV/DeleteRange", &pb.DeleteRangeRequest{Key: key, PrevKv: true}, &pb.DeleteRangeResponse{}, nil},
		{"KV/Compact", &pb.CompactionRequest{Revision: 2, Physical: true}, &pb.CompactionResponse{}, nil},
		{"Lease/LeaseGrant", &pb.LeaseGrantRequest{ID: 7, TTL: 600}, &pb.LeaseGrantResponse{}, nil},
		{"Lease/LeaseTimeToLive", &pb.LeaseTimeToLiveRequest{ID: 7, Keys: true}, &pb.LeaseTimeToLiveResponse{}, []protoreflect.Name{"TTL"}},
		{"Lease/LeaseLeases", &pb.LeaseLeasesRequest{}, &pb.LeaseLeasesResponse{}, nil},
		{"Cluster/MemberList", &pb.MemberListRequest{}, &pb.MemberListResponse{}, member},
		{"Cluster/MemberAdd", &pb.MemberAddRequest{PeerURLs: []string{"nonsense"}}, &pb.MemberAddResponse{}, member},
		{"Cluster/MemberUpdate", &pb.MemberUpdateRequest{ID: 1}, &pb.MemberUpdateResponse{}, member},
		{"Cluster/MemberPromote", &pb.MemberPromoteRequest{ID: 1}, &pb.MemberPromoteResponse{}, member},
		{"Cluster/MemberRemove", &pb.MemberRemoveRequest{ID: 1}, &pb.MemberRemoveResponse{}, member},
		{"Maintenance/Alarm", &pb.AlarmRequest{}, &pb.AlarmResponse{}, nil},
		{"Maintenance/Status", &pb.StatusRequest{}, &pb.StatusResponse{}, []protoreflect.Name{"dbSize", "dbSizeInUse", "raftIndex", "raftAppliedIndex", "raftTerm", "dbSizeQuota"}},
		{"Maintenance/Defragment", &pb.DefragmentRequest{}, &pb.DefragmentResponse{}, nil},
		{"Maintenance/Hash", &pb.HashRequest{}, &pb.HashResponse{}, []protoreflect.Name{"hash"}},
		{"Maintenance/HashKV", &pb.HashKVRequest{}, &pb.HashKVResponse{}, []protoreflect.Name{"hash"}},
		{"Maintenance/MoveLeader", &pb.MoveLeaderRequest{TargetID: 1}, &pb.MoveLeaderResponse{}, nil},
		{"Maintenance/Downgrade", &pb.DowngradeRequest{Action: pb.DowngradeRequest_VALIDATE, Version: "1.0"}, &pb.DowngradeResponse{}, nil},
		{"grpc.health.v1.Health/Check", &healthpb.HealthCheckRequest{}, &healthpb.HealthCheckResponse{}, nil},
		{"grpc.health.v1.Health/Check", &healthpb.HealthCheckRequest{Service: "none"}, &healthpb.HealthCheckResponse{}, nil},
		{"grpc.health.v1.Health/List", &healthpb.HealthListRequest{}, &healthpb.HealthListResponse{}, nil},
		{"Auth/AuthStatus", &pb.AuthStatusRequest{}, &pb.AuthStatusResponse{}, nil},
		{"Auth/UserAdd", &pb.AuthUserAddRequest{Name: "root", Password: "root"}, &pb.AuthUserAddResponse{}, nil},
		{"Auth/UserAdd", &pb.AuthUserAddRequest{Name: "u", Password: "u"}, &pb.AuthUserAddResponse{}, nil},
		{"Auth/RoleAdd", &pb.AuthRoleAddRequest{Name: "root"}, &pb.AuthRoleAddResponse{}, nil},
		{"Auth/RoleAdd", &pb.AuthRoleAddRequest{Name: "r"}, &pb.AuthRoleAddResponse{}, nil},
		{"Auth/UserGrantRole", &pb.AuthUserGrantRoleRequest{User: "root", Role: "root"}, &pb.AuthUserGrantRoleResponse{}, nil},
		{"Auth/UserGrantRole", &pb.AuthUserGrantRoleRequest{User: "u", Role: "r"}, &pb.AuthUserGrantRoleResponse{}, nil},
		{"Auth/RoleGrantPermission", &pb.AuthRoleGrantPermissionRequest{Name: "r", Perm: newReadPermission("/s/", "/s0")}, &pb.AuthRoleGrantPermissionResponse{}, nil},
		{"Auth/RoleGet", &pb.AuthRoleGetRequest{Role: "r"}, &pb.AuthRoleGetResponse{}, nil},
		{"Auth/RoleList", &pb.AuthRoleListRequest{}, &pb.AuthRoleListResponse{}, nil},
		{"Auth/UserGet", &pb.AuthUserGetRequest{Name: "u"}, &pb.AuthUserGetResponse{}, nil},
		{"Auth/UserList", &pb.AuthUserListRequest{}, &pb.AuthUserListResponse{}, nil},
		{"Auth/UserChangePassword", &pb.AuthUserChangePasswordRequest{Name: "u", Password: "v"}, &pb.AuthUserChangePasswordResponse{}, nil},
		{"Auth/RoleRevokePermission", &pb.AuthRoleRevokePermissionRequest{Role: "r", Key: []byte("/none")}, &pb.AuthRoleRevokePermissionResponse{}, nil},
		{"Auth/UserRevokeRole", &pb.AuthUserRevokeRoleRequest{Name: "u", Role: "root"}, &pb.AuthUserRevokeRoleResponse{}, nil},
	}
}

// streams calls methods with several responses.
func (m *methods) streams() {
	ctx, cancel := context.WithTimeout(m.t.Context(), time.Minute)
	defer cancel()
	stream := func(method string, request, answer proto.Message, answers int, read func([]proto.Message) string) {
		m.t.Helper()
		var ends []error
		var texts []string
		for _, side := range m.sides() {
			all, err := receive(ctx, side.conn, full(method), request, answer, answers)
			ends, texts = append(ends, err), append(texts, read(all))
		}
		m.note(method, ends, texts)
	}
	plain := func(all []proto.Message) (text string) {
		for _, a := range all {
			text += alike(a, nil)
		}
		return text
	}
	stream("KV/RangeStream", &pb.RangeRequest{Key: []byte("/s/"), RangeEnd: []byte("/s0")}, &pb.RangeStreamResponse{}, -1, func(all []proto.Message) string {
		whole := &pb.RangeResponse{}
		for _, a := range all {
			chunk, _ := a.(*pb.RangeStreamResponse)
			proto.Merge(whole, chunk.GetRangeResponse())
		}
		return alike(whole, nil)
	})
	stream("Maintenance/Snapshot", &pb.SnapshotRequest{}, &pb.SnapshotResponse{}, -1, func(all []proto.Message) string {
		size := 0
		for _, a := range all {
			part, _ := a.(*pb.SnapshotResponse)
			size += len(part.GetBlob())
		}
		return fmt.Sprint(size > 16<<10, len(all) > 1)
	})
	stream("Watch/Watch", &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
		Key: []byte("/s/"), RangeEnd: []byte("/s0"), StartRevision: 3, PrevKv: true,
	}}}, &pb.WatchResponse{}, 2, plain)
	stream("Lease/LeaseKeepAlive", &pb.LeaseKeepAliveRequest{ID: 7}, &pb.LeaseKeepAliveResponse{}, 1, plain)
	stream("grpc.health.v1.Health/Watch", &healthpb.HealthCheckRequest{}, &healthpb.HealthCheckResponse{}, 1, plain)
	m.unary(ctx, step{"Lease/LeaseRevoke", &pb.LeaseRevokeRequest{ID: 7}, &pb.LeaseRevokeResponse{}, nil})
}

// receive sends one request, and returns that many responses, or all of them if the number is -1.
func receive(ctx context.Context, conn *grpc.ClientConn, method string, request, answer proto.Message, answers int) (all []proto.Message, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	s, err := conn.NewStream(ctx, &grpc.StreamDesc{ServerStreams: true, ClientStreams: true}, method)
	if err != nil {
		return nil, err
	}
	if err := s.SendMsg(request); err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	// a server-streaming method waits for the half-close
	if answers < 0 || strings.HasPrefix(method, "/grpc.") {
		if err := s.CloseSend(); err != nil {
			return nil, err
		}
	}
	for answers < 0 || len(all) < answers {
		a := proto.Clone(answer)
		if err := s.RecvMsg(a); errors.Is(err, io.EOF) {
			return all, nil
		} else if err != nil {
			return all, err
		}
		all = append(all, a)
	}
	return all, nil
}

// elections calls the Election and Lock services.
func (m *methods) elections() {
	texts := [][]string{m.elect(m.t, m.bare, "/s/"), m.elect(m.t, m.via, "/s/")}
	if !slices.Equal(texts[0], texts[1]) {
		m.t.Errorf("elections and locks\nbare etcd: %q\nthe proxy: %q", texts[0], texts[1])
		return
	}
	for _, method := range []string{"Campaign", "Proclaim", "Leader", "Observe", "Resign"} {
		m.tested["/v3electionpb.Election/"+method] = true
	}
	for _, method := range []string{"Lock", "Unlock"} {
		m.tested["/v3lockpb.Lock/"+method] = true
	}
}

// guarded calls methods that need a user.
func (m *methods) guarded() {
	ctx := m.t.Context()
	m.unary(ctx, step{"Auth/AuthEnable", &pb.AuthEnableRequest{}, &pb.AuthEnableResponse{}, nil})
	m.unary(ctx, step{"Auth/Authenticate", &pb.AuthenticateRequest{Name: "u", Password: "wrong"}, &pb.AuthenticateResponse{}, nil})
	m.unary(ctx, step{"KV/Range", &pb.RangeRequest{Key: []byte("/s/k")}, &pb.RangeResponse{}, nil})
	var ends []error
	tokens := make(map[*side]string)
	for _, side := range m.sides() {
		a, err := side.auth.Authenticate(ctx, &pb.AuthenticateRequest{Name: "root", Password: "root"})
		ends, tokens[side] = append(ends, err), a.GetToken()
	}
	m.note("Auth/Authenticate", ends, []string{"", ""})
	for _, s := range []step{
		{"Auth/RoleRevokePermission", &pb.AuthRoleRevokePermissionRequest{Role: "r", Key: []byte("/s/"), RangeEnd: []byte("/s0")}, &pb.AuthRoleRevokePermissionResponse{}, nil},
		{"Auth/UserRevokeRole", &pb.AuthUserRevokeRoleRequest{Name: "u", Role: "r"}, &pb.AuthUserRevokeRoleResponse{}, nil},
		{"Auth/UserDelete", &pb.AuthUserDeleteRequest{Name: "u"}, &pb.AuthUserDeleteResponse{}, nil},
		{"Auth/RoleDelete", &pb.AuthRoleDeleteRequest{Role: "r"}, &pb.AuthRoleDeleteResponse{}, nil},
		{"Auth/AuthDisable", &pb.AuthDisableRequest{}, &pb.AuthDisableResponse{}, nil},
	} {
		var ends []error
		var texts []string
		for _, side := range m.sides() {
			answer := proto.Clone(s.answer)
			ends = append(ends, side.conn.Invoke(metadata.AppendToOutgoingContext(ctx, "token", tokens[side]), full(s.method), s.request, answer))
			texts = append(texts, alike(answer, nil))
		}
		m.note(s.method, ends, texts)
	}
}
