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

	"go.etcd.io/etcd/api/v3/authpb"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/prototext"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/canary"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// side is one of the two servers to compare: the bare etcd, or the proxy in front of another etcd.
type side struct {
	name  string
	conn  *grpc.ClientConn
	kv    pb.KVClient
	lease pb.LeaseClient
	watch pb.WatchClient
	auth  pb.AuthClient
	maint pb.MaintenanceClient
	// leaked is called with an error whose text contains a secret.
	leaked func(finding string)
	secret *canary.Set
}

func newSide(env *harness.Env, name string, conn *grpc.ClientConn) *side {
	return &side{
		name: name, conn: conn, kv: pb.NewKVClient(conn), lease: pb.NewLeaseClient(conn), watch: pb.NewWatchClient(conn),
		auth: pb.NewAuthClient(conn), maint: pb.NewMaintenanceClient(conn), secret: env.Sealed,
		leaked: func(finding string) { env.TB.Errorf("a secret stands in an error: %s", finding) },
	}
}

// stream marks a range request for RangeStream.
type stream struct{ *pb.RangeRequest }

// answer is all that a client can see of one call.
type answer struct {
	message         proto.Message
	err             *status.Status
	header, trailer metadata.MD
}

// do sends one request and normalizes the response: the Raft term and remaining TTLs are no
// property of the data.
func (s *side) do(ctx context.Context, request any) answer {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	var a answer
	var err error
	options := []grpc.CallOption{grpc.Header(&a.header), grpc.Trailer(&a.trailer)}
	switch request := request.(type) {
	case *pb.PutRequest:
		var m *pb.PutResponse
		m, err = s.kv.Put(ctx, request, options...)
		a.set(m, m.GetHeader(), err)
	case *pb.RangeRequest:
		var m *pb.RangeResponse
		m, err = s.kv.Range(ctx, request, options...)
		a.set(m, m.GetHeader(), err)
	case stream:
		var m *pb.RangeResponse
		m, err = s.rangeStream(ctx, request.RangeRequest)
		a.set(m, m.GetHeader(), err)
	case *pb.DeleteRangeRequest:
		var m *pb.DeleteRangeResponse
		m, err = s.kv.DeleteRange(ctx, request, options...)
		a.set(m, m.GetHeader(), err)
	case *pb.TxnRequest:
		var m *pb.TxnResponse
		m, err = s.kv.Txn(ctx, request, options...)
		a.set(m, m.GetHeader(), err)
	case *pb.CompactionRequest:
		var m *pb.CompactionResponse
		m, err = s.kv.Compact(ctx, request, options...)
		a.set(m, m.GetHeader(), err)
	case *pb.LeaseGrantRequest:
		var m *pb.LeaseGrantResponse
		m, err = s.lease.LeaseGrant(ctx, request, options...)
		a.set(m, m.GetHeader(), err)
	case *pb.LeaseRevokeRequest:
		var m *pb.LeaseRevokeResponse
		m, err = s.lease.LeaseRevoke(ctx, request, options...)
		a.set(m, m.GetHeader(), err)
	case *pb.LeaseTimeToLiveRequest:
		var m *pb.LeaseTimeToLiveResponse
		m, err = s.lease.LeaseTimeToLive(ctx, request, options...)
		if m != nil && m.TTL > 0 {
			m.TTL = m.GrantedTTL
		}
		slices.SortFunc(m.GetKeys(), slices.Compare)
		a.set(m, m.GetHeader(), err)
	case *pb.LeaseLeasesRequest:
		var m *pb.LeaseLeasesResponse
		m, err = s.lease.LeaseLeases(ctx, request, options...)
		slices.SortFunc(m.GetLeases(), func(a, b *pb.LeaseStatus) int { return int(a.ID - b.ID) })
		a.set(m, m.GetHeader(), err)
	case *pb.LeaseKeepAliveRequest:
		var m *pb.LeaseKeepAliveResponse
		m, err = s.keepAlive(ctx, request)
		a.set(m, m.GetHeader(), err)
	default:
		panic(fmt.Sprintf("request of type %T", request))
	}
	if a.err != nil {
		for _, f := range s.secret.Search(s.name, []byte(a.err.Proto().String())) {
			s.leaked(f.String())
		}
	}
	return a
}

func (a *answer) set(message proto.Message, header *pb.ResponseHeader, err error) {
	if err != nil {
		a.err = status.Convert(err)
		return
	}
	if header != nil {
		header.RaftTerm = 0
	}
	a.message = message
}

// rangeStream joins the chunks, whose bounds depend on the stored size.
func (s *side) rangeStream(ctx context.Context, request *pb.RangeRequest) (*pb.RangeResponse, error) {
	chunks, err := s.kv.RangeStream(ctx, request)
	if err != nil {
		return nil, err
	}
	whole := &pb.RangeResponse{}
	for {
		chunk, err := chunks.Recv()
		if errors.Is(err, io.EOF) {
			return whole, nil
		}
		if err != nil {
			return nil, err
		}
		proto.Merge(whole, chunk.RangeResponse)
	}
}

func (s *side) keepAlive(ctx context.Context, request *pb.LeaseKeepAliveRequest) (*pb.LeaseKeepAliveResponse, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	client, err := s.lease.LeaseKeepAlive(ctx)
	if err != nil {
		return nil, err
	}
	if err := client.Send(request); err != nil {
		return nil, err
	}
	return client.Recv()
}

func (a answer) String() string {
	metadata := fmt.Sprintf("header %v, trailer %v", a.header, a.trailer)
	if a.err != nil {
		return fmt.Sprintf("error %v %q, details %v, %s", a.err.Code(), a.err.Message(), a.err.Details(), metadata)
	}
	return fmt.Sprintf("%s; %s", text(a.message), metadata)
}

// same reports whether a client cannot tell the responses apart. It compares unknown fields too.
func (a answer) same(b answer) bool {
	if (a.err == nil) != (b.err == nil) || fmt.Sprint(a.header, a.trailer) != fmt.Sprint(b.header, b.trailer) {
		return false
	}
	if a.err != nil {
		return proto.Equal(a.err.Proto(), b.err.Proto())
	}
	return proto.Equal(a.message, b.message)
}

// text prints a message on one line, with long values truncated.
func text(m proto.Message) string {
	s := prototext.MarshalOptions{}.Format(m)
	if len(s) > 6000 {
		s = s[:6000] + "…"
	}
	return s
}

func describe(request any) string {
	switch request := request.(type) {
	case stream:
		return "RangeStream " + text(request.RangeRequest)
	case proto.Message:
		return fmt.Sprintf("%s %s", request.ProtoReflect().Descriptor().Name(), text(request))
	}
	return fmt.Sprint(request)
}

// pair sends every request to both sides and fails the test at the first difference.
type pair struct {
	t           *testing.T
	bare, proxy *side
	revision    int64 // the latest revision in a response
	trace       []string
	// responses by kind of request, with a "!" for errors; nil counts nothing
	counts map[string]int
}

// do sends the request to both sides and returns their common response.
func (p *pair) do(ctx context.Context, request any) answer {
	p.t.Helper()
	p.trace = append(p.trace, describe(request))
	bare := p.bare.do(ctx, request)
	proxy := p.proxy.do(ctx, request)
	if !bare.same(proxy) {
		p.fail("step %d: %s\n bare etcd: %v\n the proxy: %v", len(p.trace)-1, describe(request), bare, proxy)
	}
	if p.counts != nil {
		kind := strings.TrimPrefix(fmt.Sprintf("%T", request), "*etcdserverpb.")
		if bare.err != nil {
			kind += "!"
		}
		p.counts[kind]++
	}
	if h, ok := bare.message.(interface{ GetHeader() *pb.ResponseHeader }); ok && h.GetHeader().GetRevision() > 0 {
		p.revision = h.GetHeader().Revision
	}
	return bare
}

func (p *pair) fail(format string, args ...any) {
	p.t.Helper()
	for i, step := range p.trace {
		p.t.Logf("step %d: %s", i, step)
	}
	p.t.Fatalf(format, args...)
}

func newReadPermission(key, end string) *authpb.Permission {
	return &authpb.Permission{PermType: authpb.Permission_READ, Key: []byte(key), RangeEnd: []byte(end)}
}
