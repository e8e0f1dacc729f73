package proxy

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"

	"go.etcd.io/etcd/api/v3/authpb"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/mem"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// asked is a request of the table of what each kind of client may do.
type asked struct {
	request proto.Message
	path    string // of the gateway; "" for none
	own     bool   // it would change the proxies' own keys: every client is refused
	reads   bool   // it changes nothing: left to a client that may only read
}

const (
	ownLease   = 77 // keys of the proxies' own are attached to it
	otherLease = 78
)

// policyRequests is at least one request of each method.
func policyRequests() map[string][]asked {
	put := func(key string, edit func(*pb.PutRequest)) *pb.PutRequest {
		r := &pb.PutRequest{Key: []byte(key), Value: []byte("v")}
		if edit != nil {
			edit(r)
		}
		return r
	}
	keep := func(r *pb.PutRequest) { r.Value, r.IgnoreValue, r.Lease = nil, true, otherLease }
	renew := func(r *pb.PutRequest) { r.IgnoreLease = true }
	del := func(key, end string) *pb.DeleteRangeRequest {
		return &pb.DeleteRangeRequest{Key: []byte(key), RangeEnd: []byte(end), PrevKv: true}
	}
	get := func(key, end string) *pb.RangeRequest {
		return &pb.RangeRequest{Key: []byte(key), RangeEnd: []byte(end)}
	}
	op := func(m proto.Message) *pb.RequestOp {
		switch m := m.(type) {
		case *pb.PutRequest:
			return &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: m}}
		case *pb.DeleteRangeRequest:
			return &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: m}}
		case *pb.TxnRequest:
			return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: m}}
		}
		r, _ := m.(*pb.RangeRequest)
		return &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}}
	}
	then := func(m proto.Message) *pb.TxnRequest { return &pb.TxnRequest{Success: []*pb.RequestOp{op(m)}} }
	otherwise := func(m proto.Message) *pb.TxnRequest { return &pb.TxnRequest{Failure: []*pb.RequestOp{op(m)}} }
	byValue := func(m proto.Message) *pb.TxnRequest {
		r := then(m)
		r.Compare = []*pb.Compare{{Key: []byte("s/k"), Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte("v")}}}
		return r
	}
	leader := func(key string) *v3electionpb.LeaderKey {
		return &v3electionpb.LeaderKey{Name: []byte("e"), Key: []byte(key), Lease: 1}
	}
	all := map[string][]asked{
		"etcdserverpb.KV/Range":       {{get("own/k", ""), "kv/range", false, true}, {get("s/k", ""), "kv/range", false, true}},
		"etcdserverpb.KV/RangeStream": {{get("own/k", ""), "", false, true}},
		"etcdserverpb.KV/Put": {
			{put("e/k", nil), "kv/put", false, false}, {put("s/k", nil), "kv/put", false, false}, {put("s/k", keep), "kv/put", false, false},
			{put("own/k", nil), "kv/put", true, false}, {put("own/k", keep), "kv/put", true, false}, {put("own/k", renew), "kv/put", true, false}, {put("own/", nil), "kv/put", true, false},
		},
		"etcdserverpb.KV/DeleteRange": {
			{del("e/k", ""), "kv/deleterange", false, false}, {del("s/k", ""), "kv/deleterange", false, false}, {del("\x00", "\x00"), "kv/deleterange", false, false}, {del("o", "p"), "kv/deleterange", false, false},
			{del("own/k", ""), "kv/deleterange", true, false}, {del("own/", "own0"), "kv/deleterange", true, false}, {del("own/k", "z"), "kv/deleterange", true, false}, {del("a", "own/k"), "kv/deleterange", true, false},
			{del("own/k", "\x00"), "kv/deleterange", true, false},
		},
		"etcdserverpb.KV/Txn": {
			{then(put("e/k", nil)), "kv/txn", false, false}, {then(del("\x00", "\x00")), "kv/txn", false, false}, {byValue(put("e/k", nil)), "kv/txn", false, false},
			{then(get("own/k", "")), "kv/txn", false, true}, {otherwise(get("s/k", "")), "kv/txn", false, true}, {&pb.TxnRequest{}, "kv/txn", false, true}, {byValue(get("s/k", "")), "kv/txn", false, true},
			{then(put("own/k", nil)), "kv/txn", true, false}, {then(put("own/k", keep)), "kv/txn", true, false}, {otherwise(put("own/k", keep)), "kv/txn", true, false},
			{then(otherwise(then(put("own/k", keep)))), "kv/txn", true, false}, {then(then(del("own/k", ""))), "kv/txn", true, false}, {otherwise(del("own/", "own0")), "kv/txn", true, false},
			{byValue(put("own/k", keep)), "kv/txn", true, false}, {byValue(del("own/k", "z")), "kv/txn", true, false},
		},
		"etcdserverpb.KV/Compact":            {{&pb.CompactionRequest{Revision: 1}, "kv/compaction", false, false}},
		"etcdserverpb.Watch/Watch":           {{proxytest.CreateWatch("own/", "own0"), "watch", false, true}},
		"etcdserverpb.Lease/LeaseGrant":      {{&pb.LeaseGrantRequest{TTL: 1}, "lease/grant", false, false}},
		"etcdserverpb.Lease/LeaseRevoke":     {{&pb.LeaseRevokeRequest{ID: ownLease}, "lease/revoke", true, false}, {&pb.LeaseRevokeRequest{ID: otherLease}, "lease/revoke", false, false}},
		"etcdserverpb.Lease/LeaseKeepAlive":  {{&pb.LeaseKeepAliveRequest{ID: otherLease}, "lease/keepalive", false, false}},
		"etcdserverpb.Lease/LeaseTimeToLive": {{&pb.LeaseTimeToLiveRequest{ID: ownLease}, "lease/timetolive", false, true}},
		"etcdserverpb.Lease/LeaseLeases":     {{&pb.LeaseLeasesRequest{}, "lease/leases", false, true}},
		"etcdserverpb.Cluster/MemberAdd":     {{&pb.MemberAddRequest{PeerURLs: []string{"http://x:1"}}, "cluster/member/add", false, false}},
		"etcdserverpb.Cluster/MemberRemove":  {{&pb.MemberRemoveRequest{ID: 1}, "", false, false}},
		"etcdserverpb.Cluster/MemberUpdate":  {{&pb.MemberUpdateRequest{ID: 1}, "", false, false}},
		"etcdserverpb.Cluster/MemberList":    {{&pb.MemberListRequest{}, "cluster/member/list", false, true}},
		"etcdserverpb.Cluster/MemberPromote": {{&pb.MemberPromoteRequest{ID: 1}, "", false, false}},
		"etcdserverpb.Maintenance/Alarm": {
			{&pb.AlarmRequest{}, "maintenance/alarm", false, true}, {&pb.AlarmRequest{MemberID: 1, Alarm: pb.AlarmType_NOSPACE}, "maintenance/alarm", false, true},
			{&pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE}, "maintenance/alarm", false, false}, {&pb.AlarmRequest{Action: pb.AlarmRequest_ACTIVATE}, "maintenance/alarm", false, false},
		},
		"etcdserverpb.Maintenance/Status":     {{&pb.StatusRequest{}, "maintenance/status", false, true}},
		"etcdserverpb.Maintenance/Defragment": {{&pb.DefragmentRequest{}, "maintenance/defragment", false, false}},
		"etcdserverpb.Maintenance/Hash":       {{&pb.HashRequest{}, "maintenance/hash", false, true}},
		"etcdserverpb.Maintenance/HashKV":     {{&pb.HashKVRequest{}, "maintenance/hashkv", false, true}},
		"etcdserverpb.Maintenance/Snapshot":   {{&pb.SnapshotRequest{}, "maintenance/snapshot", false, true}},
		"etcdserverpb.Maintenance/MoveLeader": {{&pb.MoveLeaderRequest{}, "maintenance/transfer-leadership", false, false}},
		"etcdserverpb.Maintenance/Downgrade":  {{&pb.DowngradeRequest{}, "maintenance/downgrade", false, false}},
		"v3electionpb.Election/Campaign":      {{&v3electionpb.CampaignRequest{Name: []byte("own"), Lease: 1}, "election/campaign", true, false}, {&v3electionpb.CampaignRequest{Name: []byte("e"), Lease: 1}, "election/campaign", false, false}},
		"v3electionpb.Election/Proclaim":      {{&v3electionpb.ProclaimRequest{Leader: leader("own/1")}, "election/proclaim", true, false}, {&v3electionpb.ProclaimRequest{Leader: leader("e/1")}, "election/proclaim", false, false}},
		"v3electionpb.Election/Leader":        {{&v3electionpb.LeaderRequest{Name: []byte("own")}, "election/leader", false, true}},
		"v3electionpb.Election/Observe":       {{&v3electionpb.LeaderRequest{Name: []byte("own")}, "election/observe", false, true}},
		"v3electionpb.Election/Resign":        {{&v3electionpb.ResignRequest{Leader: leader("own/1")}, "election/resign", true, false}, {&v3electionpb.ResignRequest{Leader: leader("e/1")}, "election/resign", false, false}},
		"v3lockpb.Lock/Lock":                  {{&v3lockpb.LockRequest{Name: []byte("own/deep"), Lease: 1}, "lock/lock", true, false}, {&v3lockpb.LockRequest{Name: []byte("e"), Lease: 1}, "lock/lock", false, false}},
		"v3lockpb.Lock/Unlock":                {{&v3lockpb.UnlockRequest{Key: []byte("own/1")}, "lock/unlock", true, false}, {&v3lockpb.UnlockRequest{Key: []byte("e/1")}, "lock/unlock", false, false}},
		"grpc.health.v1.Health/Check":         {{&healthpb.HealthCheckRequest{}, "", false, true}},
		"grpc.health.v1.Health/List":          {{&healthpb.HealthListRequest{}, "", false, true}},
		"grpc.health.v1.Health/Watch":         {{&healthpb.HealthCheckRequest{}, "", false, true}},
	}
	for name, a := range map[string]asked{
		"AuthEnable": {&pb.AuthEnableRequest{}, "enable", false, false}, "AuthDisable": {&pb.AuthDisableRequest{}, "disable", false, false}, "AuthStatus": {&pb.AuthStatusRequest{}, "status", false, true},
		"Authenticate": {&pb.AuthenticateRequest{Name: "u"}, "authenticate", false, true}, "UserAdd": {&pb.AuthUserAddRequest{Name: "u"}, "user/add", false, false},
		"UserGet": {&pb.AuthUserGetRequest{Name: "u"}, "user/get", false, true}, "UserList": {&pb.AuthUserListRequest{}, "user/list", false, true},
		"UserDelete": {&pb.AuthUserDeleteRequest{Name: "u"}, "user/delete", false, false}, "UserChangePassword": {&pb.AuthUserChangePasswordRequest{Name: "u"}, "user/changepw", false, false},
		"UserGrantRole": {&pb.AuthUserGrantRoleRequest{User: "u"}, "user/grant", false, false}, "UserRevokeRole": {&pb.AuthUserRevokeRoleRequest{Name: "u"}, "user/revoke", false, false},
		"RoleAdd": {&pb.AuthRoleAddRequest{Name: "r"}, "role/add", false, false}, "RoleGet": {&pb.AuthRoleGetRequest{Role: "r"}, "role/get", false, true},
		"RoleList": {&pb.AuthRoleListRequest{}, "role/list", false, true}, "RoleDelete": {&pb.AuthRoleDeleteRequest{Role: "r"}, "role/delete", false, false},
		"RoleGrantPermission":  {&pb.AuthRoleGrantPermissionRequest{Name: "r", Perm: &authpb.Permission{Key: []byte("own/k")}}, "role/grant", false, false},
		"RoleRevokePermission": {&pb.AuthRoleRevokePermissionRequest{Role: "r", Key: []byte("own/k")}, "role/revoke", false, false},
	} {
		a.path = "auth/" + a.path
		all["etcdserverpb.Auth/"+name] = []asked{a}
	}
	return all
}

// policyEtcd answers every call with an empty message, but for the keys of a lease, and notes what
// it is requested.
type policyEtcd struct {
	t  *testing.T
	mu sync.Mutex
	// changed are the methods by which something was changed; the reads that the proxy needs to
	// decide are not among them.
	changed []string
}

func (e *policyEtcd) Serve(_ any, ss grpc.ServerStream) error {
	full, _ := grpc.MethodFromServerStream(ss)
	in := new(rpc.Message)
	if err := ss.RecvMsg(in); err != nil {
		return err
	}
	defer in.Free()
	msg := in.Data.Materialize()
	var answer []byte
	e.mu.Lock()
	defer e.mu.Unlock()
	switch full {
	case "/etcdserverpb.Lease/LeaseTimeToLive":
		var r pb.LeaseTimeToLiveRequest
		if err := proto.Unmarshal(msg, &r); err != nil {
			e.t.Error(err)
		}
		if r.ID == ownLease && r.Keys {
			answer, _ = proto.Marshal(&pb.LeaseTimeToLiveResponse{Keys: [][]byte{[]byte("e/k"), []byte("own/k")}})
		}
	case "/etcdserverpb.KV/Txn":
		var r pb.TxnRequest
		if err := proto.Unmarshal(msg, &r); err != nil {
			e.t.Error(err)
		}
		out, changes := &pb.TxnResponse{Header: &pb.ResponseHeader{Revision: 5}, Succeeded: true}, false
		for _, op := range append(r.Success, r.Failure...) {
			changes = changes || op.GetRequestPut() != nil || op.GetRequestDeleteRange() != nil || op.GetRequestTxn() != nil
		}
		for _, op := range r.Success {
			switch {
			case op.GetRequestDeleteRange() != nil:
				out.Responses = append(out.Responses, &pb.ResponseOp{Response: &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: &pb.DeleteRangeResponse{}}})
			case op.GetRequestPut() != nil:
				out.Responses = append(out.Responses, &pb.ResponseOp{Response: &pb.ResponseOp_ResponsePut{ResponsePut: &pb.PutResponse{}}})
			default:
				out.Responses = append(out.Responses, &pb.ResponseOp{Response: &pb.ResponseOp_ResponseRange{ResponseRange: &pb.RangeResponse{}}})
			}
		}
		if changes {
			e.changed = append(e.changed, full)
		}
		answer, _ = proto.Marshal(out)
	default:
		e.changed = append(e.changed, full)
	}
	if bytes.Contains(msg, []byte("own/k")) && (full == "/etcdserverpb.KV/Txn" || strings.HasSuffix(full, "/Put") || strings.HasSuffix(full, "/DeleteRange")) && len(e.changed) > 0 {
		e.t.Errorf("%s with an own key reached etcd: %q", full, msg)
	}
	return ss.SendMsg(&rpc.Message{Data: mem.BufferSlice{mem.SliceBuffer(answer)}})
}

// reached returns what was changed since it was last asked.
func (e *policyEtcd) reached() []string {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := e.changed
	e.changed = nil
	return all
}

// TestPolicyOfEveryMethod: what each kind of client may do with each method, over gRPC and by the
// JSON gateway, relayed and handled: nobody changes the proxies' own keys, a client that is given
// stored bytes only reads, and a denied client does nothing. What is refused does not reach etcd.
func TestPolicyOfEveryMethod(t *testing.T) {
	requests := policyRequests()
	for _, m := range etcdapi.MethodTable() {
		if len(requests[m.Path[1:]]) == 0 {
			t.Errorf("there is no request of %s", m.Path)
		}
	}
	bothWays(t, func(t *testing.T, startProxy starter) {
		etcd := &policyEtcd{t: t}
		ca := proxytest.NewAuthority(t, "ca")
		cert, key, _ := ca.Issue("server", "server")
		p := startProxy(t, proxytest.ServeAll(t, etcd.Serve), []etcdapi.Rule{{Prefix: "s/", Sealer: proxytest.Reverser{}}}, func(c *Config) {
			c.OwnPrefixes = []string{"own/"}
			c.Listeners[0].TLS = &listener.TLS{CertFile: cert, KeyFile: key, ClientCAFile: ca.File}
			c.Listeners[0].AllowedClients, c.Listeners[0].CiphertextClients = []string{"allowed"}, []string{"ciphertext"}
		})
		target := p.Addrs()[0].String()
		for _, client := range []string{"allowed", "ciphertext", "denied"} {
			conn, web := ca.Client(t, target, client), webOf(t, ca, client)
			for full, all := range requests {
				for _, a := range all {
					want := ""
					switch {
					case client == "denied":
						want = rpc.TextPrefix + `client "denied" is not allowed here`
					case client == "ciphertext" && !a.reads:
						want = "etcd-kms-proxy: this client is one of the listener's ciphertextClients, which may only read"
					case a.own && strings.HasSuffix(full, "/LeaseRevoke"):
						want = "etcd-kms-proxy: keys that the proxies keep for themselves are attached to this lease"
					case a.own:
						want = "etcd-kms-proxy: this would change keys that the proxies keep for themselves: use keys with another prefix"
					}
					msg, err := proto.Marshal(a.request)
					if err != nil {
						t.Fatal(err)
					}
					_, err = proxytest.RawCall(proxytest.TestContext(t), conn, "/"+full, msg)
					got := status.Convert(err)
					if reached := etcd.reached(); got.Message() != want || want != "" && got.Code() != codes.PermissionDenied || want != "" && len(reached) > 0 {
						t.Errorf("%s, %s %v: %v, want %q; etcd saw %q", client, full, a.request, err, want, reached)
					}
					if a.path == "" {
						continue
					}
					got = web.post(t, "https://"+target+"/v3/"+a.path, a.request)
					if reached := etcd.reached(); got.Message() != want || want != "" && got.Code() != codes.PermissionDenied || want != "" && len(reached) > 0 {
						t.Errorf("%s, /v3/%s %v: %v, want %q; etcd saw %q", client, a.path, a.request, got, want, reached)
					}
				}
			}
		}
	})
}

// web is a client of the gateway.
type web struct{ http.Client }

func webOf(t *testing.T, a *proxytest.Authority, cn string) *web {
	t.Helper()
	cert, key, _ := a.Issue("web-"+cn, cn)
	pair, err := tls.LoadX509KeyPair(cert, key)
	if err != nil {
		t.Fatal(err)
	}
	roots := x509.NewCertPool()
	roots.AddCert(a.Cert)
	transport := &http.Transport{TLSClientConfig: &tls.Config{RootCAs: roots, Certificates: []tls.Certificate{pair}}}
	t.Cleanup(transport.CloseIdleConnections)
	return &web{http.Client{Transport: transport, Timeout: proxytest.Patience}}
}

// post sends a request in JSON, and returns the status in the first answer: that of an error, or
// OK.
func (w *web) post(t *testing.T, url string, request proto.Message) *status.Status {
	t.Helper()
	body, err := protojson.Marshal(request)
	if err != nil {
		t.Fatal(err)
	}
	r, err := http.NewRequestWithContext(context.Background(), http.MethodPost, url, bytes.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Content-Type", "application/json")
	answer, err := w.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	said, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	type failure struct {
		Code    codes.Code `json:"code"`
		Message string     `json:"message"`
	}
	var one struct {
		failure
		Error *failure `json:"error"` // of a stream
	}
	if len(said) > 0 {
		if err := json.Unmarshal(said, &one); err != nil {
			t.Fatalf("%s: %q: %v", url, said, err)
		}
	}
	if one.Error != nil {
		one.failure = *one.Error
	}
	return status.New(one.Code, one.Message)
}
