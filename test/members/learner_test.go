package members

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/encoding/gzip"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// withLearner returns a cluster of one voting member and a learner, with a key that both have.
func withLearner(t *testing.T, version string) (s *site, voter, learner *harness.Member) {
	t.Helper()
	s = &site{Env: harness.New(t)}
	s.cluster = s.StartCluster(1, harness.EtcdConfig{Version: version})
	voter, learner = s.cluster.Members[0], s.cluster.AddLearner()
	kv := pb.NewKVClient(s.stub(t, voter.URL))
	if _, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte(plain), Value: []byte(value)}); err != nil {
		t.Fatal(err)
	}
	has := pb.NewKVClient(s.stub(t, learner.URL))
	harness.Eventually(t, within, "the learner to have the key", func() error {
		r, err := has.Range(t.Context(), &pb.RangeRequest{Key: []byte(plain), Serializable: true})
		if err == nil && len(r.Kvs) == 0 {
			err = fmt.Errorf("not yet")
		}
		return err
	})
	return s, voter, learner
}

// ways are options of clients whose calls the proxy relays or handles.
var ways = map[string][]grpc.DialOption{"relayed": nil, "handled": {grpc.WithDefaultCallOptions(grpc.UseCompressor(gzip.Name))}}

// calls are those that a learner refuses, each as sent by a client that does not retry.
var calls = map[string]func(ctx context.Context, conn *grpc.ClientConn) error{
	"put": func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := pb.NewKVClient(conn).Put(ctx, &pb.PutRequest{Key: []byte(sealed), Value: []byte(value)})
		return err
	},
	"get": func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(sealed)})
		return err
	},
	"streamed get": func(ctx context.Context, conn *grpc.ClientConn) error {
		stream, err := pb.NewKVClient(conn).RangeStream(ctx, &pb.RangeRequest{Key: []byte(sealed)})
		for err == nil {
			_, err = stream.Recv()
		}
		if err == io.EOF { //nolint:errorlint // the stream's own end
			return nil
		}
		return err
	},
	"lease grant": func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := pb.NewLeaseClient(conn).LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: 60})
		return err
	},
	"lease keep-alive": func(ctx context.Context, conn *grpc.ClientConn) error {
		stream, err := pb.NewLeaseClient(conn).LeaseKeepAlive(ctx)
		if err != nil {
			return err
		}
		if err := stream.Send(&pb.LeaseKeepAliveRequest{ID: 1}); err != nil && err != io.EOF { //nolint:errorlint // the stream's own end, whose error Recv has
			return err
		}
		_, err = stream.Recv()
		return err
	},
	"transaction": func(ctx context.Context, conn *grpc.ClientConn) error {
		put := &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(sealed), Value: []byte(value)}}}
		_, err := pb.NewKVClient(conn).Txn(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{put}})
		return err
	},
	"compare by value": func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := swap(value, false)(ctx, conn, sealed)
		return err
	},
	"watch": func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := watch(ctx, conn, plain)
		return err
	},
	"list of members": func(ctx context.Context, conn *grpc.ClientConn) error {
		_, err := pb.NewClusterClient(conn).MemberList(ctx, &pb.MemberListRequest{Linearizable: true})
		return err
	},
}

// TestLearnerAmongEndpoints checks that no call is refused by a learner while another member is
// available, whatever the order of the endpoints, and that the learner gets its share of calls
// after it was promoted.
func TestLearnerAmongEndpoints(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"3.5", "3.7"} { // which refuse with different codes
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			s, voter, learner := withLearner(t, version)
			var proxies []*harness.Proxy
			for name, endpoints := range map[string][]string{"first": {learner.URL, voter.URL}, "second": {voter.URL, learner.URL}} {
				p := s.NewProxy(name, harness.ProxyConfig{
					Etcd: harness.Upstream{Endpoints: endpoints}, KMS: []harness.KMSConfig{s.LocalKey("dev", 1)}, Rules: []harness.Rule{{Prefix: "/s/", WriteWith: "dev"}},
				})
				p.Start()
				p.WaitReady(within)
				proxies = append(proxies, p)
				for way, opts := range ways {
					for what, call := range calls {
						if what == "streamed get" && version != "3.7" {
							continue
						}
						t.Run(name+"/"+way+"/"+what, func(t *testing.T) {
							for n := range 10 { // each over its own connection
								ctx, cancel := context.WithTimeout(t.Context(), within)
								defer cancel()
								if err := call(ctx, harness.Dial(t, p.Address, nil, opts...)); err != nil {
									t.Errorf("call %d: %v", n, err)
								}
							}
						})
					}
				}
			}
			cluster := pb.NewClusterClient(s.stub(t, voter.URL))
			harness.Eventually(t, within, "the learner to be promoted: it has to be in step with its leader", func() error {
				_, err := cluster.MemberPromote(t.Context(), &pb.MemberPromoteRequest{ID: learner.ID})
				return err
			})
			for _, p := range proxies {
				kv := pb.NewKVClient(harness.Dial(t, p.Address, nil))
				harness.Eventually(t, within, "the promoted member to be sent calls", func() error {
					r, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte(sealed)})
					if err == nil && r.Header.MemberId != learner.ID {
						err = fmt.Errorf("the other one answered")
					}
					return err
				})
			}
		})
	}
}

// TestOnlyLearnerLeft checks that while the voting members are down, the learner serves what it
// can, and the proxy refuses the rest with etcd's text.
func TestOnlyLearnerLeft(t *testing.T) {
	t.Parallel()
	s, voter, learner := withLearner(t, "3.7")
	p := s.NewProxy("proxy", harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: []string{voter.URL, learner.URL}}, KMS: []harness.KMSConfig{s.LocalKey("dev", 1)}, Rules: []harness.Rule{{Prefix: "/s/", WriteWith: "dev"}},
	})
	p.Start()
	p.WaitReady(within)
	s.each = append(s.each, p.URL())
	voter.Stop(within)
	for _, opts := range ways {
		conn := harness.Dial(t, p.Address, nil, opts...)
		kv := pb.NewKVClient(conn)
		harness.Eventually(t, within, "a serializable read", func() error {
			r, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte(plain), Serializable: true})
			if err == nil && string(r.Kvs[0].Value) != value {
				t.Errorf("the value is %q", r.Kvs[0].Value)
			}
			return err
		})
		if _, err := pb.NewMaintenanceClient(conn).Status(t.Context(), &pb.StatusRequest{}); err != nil {
			t.Errorf("status: %v", err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), within)
		_, err := kv.Put(ctx, &pb.PutRequest{Key: []byte(sealed), Value: []byte(value)})
		cancel()
		if want := []codes.Code{codes.FailedPrecondition, codes.Unavailable}; !slices.Contains(want, status.Code(err)) {
			t.Errorf("a put: %v", err)
		}
	}
	begun := time.Now()
	voter.Begin()
	voter.WaitReady()
	for _, url := range s.each {
		kv := pb.NewKVClient(s.stub(t, url))
		harness.Eventually(t, within, "a put", func() error {
			_, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte(sealed), Value: []byte(value)})
			return err
		})
	}
	t.Logf("back after %v", time.Since(begun))
}

// TestLearnerAlone checks that a proxy whose only endpoint is a learner serves what the learner
// serves, whatever its coordination settings, and everything after the learner was promoted.
func TestLearnerAlone(t *testing.T) {
	t.Parallel()
	for _, version := range []string{"3.5", "3.7"} {
		t.Run(version, func(t *testing.T) {
			t.Parallel()
			s, voter, learner := withLearner(t, version)
			cfg := harness.ProxyConfig{
				Etcd: harness.Upstream{Endpoints: []string{voter.URL}}, KMS: []harness.KMSConfig{s.LocalKey("dev", 1)}, Rules: []harness.Rule{{Prefix: "/s/", WriteWith: "dev"}},
			}
			s.StartProxy("voter", cfg).WaitReady(within) // leaves a record of its rules
			harness.Eventually(t, within, "the record of the rules", func() error {
				r, err := pb.NewKVClient(s.stub(t, learner.URL)).Range(t.Context(), &pb.RangeRequest{Key: []byte("/etcd-kms-proxy/agreement"), Serializable: true})
				if err == nil && len(r.Kvs) == 0 {
					err = fmt.Errorf("not yet")
				}
				return err
			})
			cfg.Etcd.Endpoints = []string{learner.URL}
			var proxies []*harness.Proxy
			for name, args := range map[string][]string{"proxy": nil, "alone": {"--allow-weakening"}} {
				p := s.NewProxy(name, cfg)
				if name == "alone" {
					alone := cfg
					alone.Coordination = harness.NoCoordination()
					p = s.NewProxy(name, alone)
				}
				p.Args = args
				p.Start()
				proxies = append(proxies, p)
				conn := harness.Dial(t, p.Address, nil)
				harness.Eventually(t, within, name+": a serializable read", func() error {
					r, err := pb.NewKVClient(conn).Range(t.Context(), &pb.RangeRequest{Key: []byte(plain), Serializable: true})
					if err == nil && (len(r.Kvs) != 1 || string(r.Kvs[0].Value) != value) {
						err = fmt.Errorf("it is %v", r.Kvs)
					}
					return err
				})
				if r, err := pb.NewMaintenanceClient(conn).Status(t.Context(), &pb.StatusRequest{}); err != nil || !r.IsLearner {
					t.Errorf("%s: status: %v, %v", name, r, err)
				}
				direct := s.stub(t, learner.URL)
				for what, call := range calls {
					if what == "streamed get" && version != "3.7" {
						continue
					}
					if got, want := errorOf(call(t.Context(), conn)), errorOf(call(t.Context(), direct)); got != want {
						t.Errorf("%s: %s: %s, and %s of the learner", name, what, got, want)
					}
				}
			}
			cluster := pb.NewClusterClient(s.stub(t, voter.URL))
			harness.Eventually(t, within, "the learner to be promoted: it has to be in step with its leader", func() error {
				_, err := cluster.MemberPromote(t.Context(), &pb.MemberPromoteRequest{ID: learner.ID})
				return err
			})
			for _, p := range proxies {
				harness.Eventually(t, within, "a put", func() error { return calls["put"](t.Context(), harness.Dial(t, p.Address, nil)) })
			}
		})
	}
}

// TestLearnerWithAuth checks a proxy in front of a learner, which does not authenticate users, so
// that the proxy cannot compare its rules there. It serves what the learner serves to clients with
// a token, refuses the rest as the learner does, and compares its rules after the learner was
// promoted.
func TestLearnerWithAuth(t *testing.T) {
	t.Parallel()
	s, voter, learner := withLearner(t, "3.7")
	auth, ctx := pb.NewAuthClient(s.stub(t, voter.URL)), t.Context()
	_, err := auth.UserAdd(ctx, &pb.AuthUserAddRequest{Name: "root", Password: "pw"})
	if err == nil {
		_, err = auth.RoleAdd(ctx, &pb.AuthRoleAddRequest{Name: "root"})
	}
	if err == nil {
		_, err = auth.UserGrantRole(ctx, &pb.AuthUserGrantRoleRequest{User: "root", Role: "root"})
	}
	if err == nil {
		_, err = auth.AuthEnable(ctx, &pb.AuthEnableRequest{})
	}
	if err != nil {
		t.Fatal(err)
	}
	token, err := auth.Authenticate(ctx, &pb.AuthenticateRequest{Name: "root", Password: "pw"})
	if err != nil {
		t.Fatal(err)
	}
	ctx = metadata.AppendToOutgoingContext(ctx, "token", token.Token)
	cfg := harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: []string{voter.URL}, Username: "root", PasswordFile: s.File("password", []byte("pw"))},
		KMS:  []harness.KMSConfig{s.LocalKey("dev", 1)}, Rules: []harness.Rule{{Prefix: "/s/", WriteWith: "dev"}},
	}
	s.StartProxy("voter", cfg).WaitReady(within) // leaves a record of its rules
	harness.Eventually(t, within, "the record of the rules", func() error {
		r, err := pb.NewKVClient(s.stub(t, voter.URL)).Range(ctx, &pb.RangeRequest{Key: []byte("/etcd-kms-proxy/agreement")})
		if err == nil && len(r.Kvs) == 0 {
			err = fmt.Errorf("not yet")
		}
		return err
	})
	cfg.Etcd.Endpoints = []string{learner.URL}
	same := s.StartProxy("same", cfg)
	cfg.Rules = []harness.Rule{{Prefix: "/s/", WriteWith: "plaintext"}}
	weaker := s.StartProxy("weaker", cfg)
	for _, p := range []*harness.Proxy{same, weaker} {
		conn := harness.Dial(t, p.Address, nil)
		harness.Eventually(t, within, "a serializable read", func() error {
			r, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte(plain), Serializable: true})
			if err == nil && (len(r.Kvs) != 1 || string(r.Kvs[0].Value) != value) {
				err = fmt.Errorf("it is %v", r.Kvs)
			}
			return err
		})
		if r, err := pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{}); err != nil || !r.IsLearner {
			t.Errorf("status: %v, %v", r, err)
		}
		for what, call := range calls {
			if got, want := errorOf(call(ctx, conn)), errorOf(call(ctx, s.stub(t, learner.URL))); got != want {
				t.Errorf("%s: %s, and %s of the learner", what, got, want)
			}
		}
	}
	cluster := pb.NewClusterClient(s.stub(t, voter.URL))
	harness.Eventually(t, within, "the learner to be promoted: it has to be in step with its leader", func() error {
		_, err := cluster.MemberPromote(ctx, &pb.MemberPromoteRequest{ID: learner.ID})
		return err
	})
	if code := weaker.Wait(within); code != 3 || !strings.Contains(weaker.Log(), "would be written as plaintext") {
		t.Errorf("the proxy with weaker rules: exit code %d", code)
	}
	harness.Eventually(t, within, "a put", func() error { return calls["put"](ctx, harness.Dial(t, same.Address, nil)) })
	same.WaitReady(within)
}
