package members

import (
	"context"
	"fmt"
	"io"
	"strings"
	"sync"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// Keys of one history: one for requests to the member, and two for the proxy in front of it, the
// last under a rule.
const plain, passed, sealed, value = "/p/key", "/p/passed", "/s/key", "the value"

// ask is a request, and the part of the responses to it that must be equal.
type ask struct {
	name string
	call func(ctx context.Context, conn *grpc.ClientConn, key string) (proto.Message, error)
}

func (s *site) stub(t *testing.T, url string) *grpc.ClientConn {
	t.Helper()
	return harness.Dial(t, strings.TrimPrefix(url, "http://"), nil)
}

// same sends the request to the member for one key and to the proxy for the others: the responses
// and errors must be equal except for keys and revisions.
func same(t *testing.T, member, via *grpc.ClientConn, asks []ask) {
	t.Helper()
	var all sync.WaitGroup
	for _, a := range asks {
		all.Go(func() {
			type answer struct {
				msg proto.Message
				err error
			}
			var answers [3]answer
			var three sync.WaitGroup
			for i, at := range []struct {
				conn *grpc.ClientConn
				key  string
			}{{member, plain}, {via, passed}, {via, sealed}} {
				three.Go(func() {
					ctx, cancel := context.WithTimeout(t.Context(), within)
					defer cancel()
					answers[i].msg, answers[i].err = a.call(ctx, at.conn, at.key)
				})
			}
			three.Wait()
			want := fmt.Sprint(answers[0].msg, errorOf(answers[0].err))
			t.Logf("%s: %s", a.name, want)
			for _, got := range answers[1:] {
				if got := fmt.Sprint(got.msg, errorOf(got.err)); got != want {
					t.Errorf("%s: %s through the proxy, %s of the member", a.name, got, want)
				}
			}
		})
	}
	all.Wait()
}

// errorOf returns a status without what depends on the moment: etcd adds a guess at the cause of a
// timeout.
func errorOf(err error) string {
	if err == nil {
		return ""
	}
	text, _, _ := strings.Cut(status.Convert(err).Message(), ", ")
	return fmt.Sprintf("%v: %s", status.Code(err), text)
}

// values returns pairs as far as two keys of one history agree.
func values(kvs ...*mvccpb.KeyValue) *pb.RangeResponse {
	r := new(pb.RangeResponse)
	for _, kv := range kvs {
		r.Kvs = append(r.Kvs, &mvccpb.KeyValue{Value: kv.GetValue(), Version: kv.GetVersion()})
	}
	return r
}

func get(serializable bool) func(context.Context, *grpc.ClientConn, string) (proto.Message, error) {
	return func(ctx context.Context, conn *grpc.ClientConn, key string) (proto.Message, error) {
		r, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(key), Serializable: serializable})
		return values(r.GetKvs()...), err
	}
}

// swap compares by VALUE, and reads in both branches.
func swap(value string, serializable bool) func(context.Context, *grpc.ClientConn, string) (proto.Message, error) {
	return func(ctx context.Context, conn *grpc.ClientConn, key string) (proto.Message, error) {
		read := []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(key), Serializable: serializable}}}}
		r, err := pb.NewKVClient(conn).Txn(ctx, &pb.TxnRequest{
			Compare: []*pb.Compare{{Key: []byte(key), Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte(value)}}}, Success: read, Failure: read,
		})
		if err != nil {
			return nil, err
		}
		kvs := r.GetResponses()[0].GetResponseRange().GetKvs()
		return &pb.TxnResponse{Succeeded: r.GetSucceeded(), Responses: []*pb.ResponseOp{{Response: &pb.ResponseOp_ResponseRange{ResponseRange: values(kvs...)}}}}, nil
	}
}

func put(ctx context.Context, conn *grpc.ClientConn, key string) (proto.Message, error) {
	_, err := pb.NewKVClient(conn).Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte("other")})
	return nil, err
}

// watch returns the first response, or how the stream ended.
func watch(ctx context.Context, conn *grpc.ClientConn, key string) (proto.Message, error) {
	stream, err := pb.NewWatchClient(conn).Watch(ctx)
	if err != nil {
		return nil, err
	}
	err = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte(key), StartRevision: 1}}})
	if err != nil && err != io.EOF { //nolint:errorlint // the stream's own end, whose error Recv has
		return nil, err
	}
	for {
		r, err := stream.Recv()
		if err != nil {
			return nil, err
		}
		for _, e := range r.GetEvents() {
			return &pb.RangeResponse{Kvs: values(e.GetKv()).GetKvs()}, nil
		}
	}
}

// needsLeader adds the metadata that makes a member without a leader refuse a call.
func needsLeader(call func(context.Context, *grpc.ClientConn, string) (proto.Message, error)) func(context.Context, *grpc.ClientConn, string) (proto.Message, error) {
	return func(ctx context.Context, conn *grpc.ClientConn, key string) (proto.Message, error) {
		return call(metadata.AppendToOutgoingContext(ctx, "hasleader", "true"), conn, key)
	}
}

func (s *site) fill(t *testing.T) {
	t.Helper()
	kv := pb.NewKVClient(s.stub(t, s.all))
	for _, key := range []string{sealed, passed, plain} {
		if _, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte(key), Value: []byte(value)}); err != nil {
			t.Fatal(err)
		}
	}
}

// TestLeaderLost checks that a proxy in front of a member without a majority responds like that
// member, and refuses what it refuses, and that everything works again with the majority.
func TestLeaderLost(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.fill(t)
	left := s.cluster.Members[0]
	member, via := s.stub(t, left.URL), s.stub(t, s.each[0])
	harness.Eventually(t, within, "the member to have all keys", func() error {
		r, err := pb.NewKVClient(member).Range(t.Context(), &pb.RangeRequest{Key: []byte(plain), Serializable: true})
		if err == nil && len(r.Kvs) == 0 {
			err = fmt.Errorf("not yet")
		}
		return err
	})
	s.cluster.LoseMajority()
	same(t, member, via, []ask{
		{"a linearizable read", get(false)},
		{"a serializable read", get(true)},
		{"a serializable read that needs a leader", needsLeader(get(true))},
		{"a serializable compare that holds", swap(value, true)},
		{"a serializable compare that does not", swap("other", true)},
		{"a compare", swap(value, false)},
		{"a put", put},
		{"a put that needs a leader", needsLeader(put)},
		{"a watch", watch},
		{"a watch that needs a leader", needsLeader(watch)},
	})
	s.cluster.RegainMajority()
	same(t, member, via, []ask{{"a put that needs a leader", needsLeader(put)}})
	same(t, member, via, []ask{{"a read", get(false)}, {"a compare", swap("other", false)}})
}

// TestLearner checks that a proxy in front of a learner refuses what etcd's learners refuse, and
// decrypts what they serve. After the learner was promoted through the proxy, it serves everything.
func TestLearner(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	s.fill(t)
	learner := s.cluster.AddLearner()
	address := harness.FreeAddress(t)
	s.StartProxy("learner", harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: []string{learner.URL}}, KMS: []harness.KMSConfig{s.LocalKey("dev", 1)}, Rules: []harness.Rule{{Prefix: "/s/", WriteWith: "dev"}},
		Listeners: []harness.Listener{{Address: address}},
	})
	member, via := s.stub(t, learner.URL), harness.Dial(t, address, nil)
	harness.Eventually(t, within, "the learner to have all keys", func() error {
		r, err := pb.NewKVClient(member).Range(t.Context(), &pb.RangeRequest{Key: []byte(plain), Serializable: true})
		if err == nil && len(r.Kvs) == 0 {
			err = fmt.Errorf("not yet")
		}
		return err
	})
	same(t, member, via, []ask{
		{"a linearizable read", get(false)},
		{"a serializable read", get(true)},
		{"a serializable compare", swap(value, true)},
		{"a compare", swap(value, false)},
		{"a put", put},
		{"a watch", watch},
		{"the list of members", func(ctx context.Context, conn *grpc.ClientConn, _ string) (proto.Message, error) {
			_, err := pb.NewClusterClient(conn).MemberList(ctx, &pb.MemberListRequest{Linearizable: true})
			return nil, err
		}},
		{"its status", func(ctx context.Context, conn *grpc.ClientConn, _ string) (proto.Message, error) {
			r, err := pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{})
			return &pb.StatusResponse{IsLearner: r.GetIsLearner(), Version: r.GetVersion()}, err
		}},
	})
	cluster := pb.NewClusterClient(s.stub(t, s.all))
	harness.Eventually(t, within, "the learner to be promoted: it has to be in step with its leader", func() error {
		_, err := cluster.MemberPromote(t.Context(), &pb.MemberPromoteRequest{ID: learner.ID})
		return err
	})
	harness.Eventually(t, within, "the promoted member to serve", func() error {
		_, err := get(false)(t.Context(), member, plain)
		return err
	})
	same(t, member, via, []ask{{"a put", put}})
	same(t, member, via, []ask{{"a read", get(false)}, {"a compare", swap("other", false)}})
}
