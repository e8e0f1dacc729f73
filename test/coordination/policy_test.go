package coordination

import (
	"context"
	"fmt"
	"net/http"
	"strings"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3election/v3electionpb"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3lock/v3lockpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// policySite is a site whose proxy has announced itself and agreed on its rules, and clients of it.
type policySite struct {
	*site
	proxy *harness.Proxy
	ca    *harness.CA
	lease int64 // of the proxy's announcement
}

func newPolicySite(t *testing.T) *policySite {
	t.Helper()
	p := &policySite{site: newSite(t)}
	p.ca = p.NewCA("clients")
	server := p.ca.Server("proxy")
	p.cfg.Listeners = []harness.Listener{{
		Address: harness.FreeAddress(t), AllowedClients: []string{"allowed"}, CiphertextClients: []string{"backup"},
		TLS: &harness.ServerTLS{CertFile: server.CertFile, KeyFile: server.KeyFile, ClientCAFile: p.ca.File},
	}}
	p.proxy = p.StartProxy("proxy", p.cfg)
	p.proxy.WaitReady(within)
	p.agreed(t, prefix)
	harness.Eventually(t, within, "the announcement", func() error {
		r, err := p.kv.Range(t.Context(), &pb.RangeRequest{Key: []byte("/etcd-kms-proxy/proxies/"), RangeEnd: []byte("/etcd-kms-proxy/proxies0")})
		if err != nil || len(r.Kvs) != 1 || r.Kvs[0].Lease == 0 {
			return fmt.Errorf("it is %v, %w", r, err)
		}
		p.lease = r.Kvs[0].Lease
		return nil
	})
	return p
}

func (p *policySite) as(t *testing.T, name string) *grpc.ClientConn {
	t.Helper()
	return harness.Dial(t, p.proxy.Address, p.ca.ClientTLS(p.ca.Client(name, name)))
}

// own returns the proxies' own keys in etcd.
func (p *policySite) own(t *testing.T) string {
	t.Helper()
	r, err := p.kv.Range(t.Context(), &pb.RangeRequest{Key: []byte("/etcd-kms-proxy/"), RangeEnd: []byte("/etcd-kms-proxy0")})
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, kv := range r.Kvs {
		all = append(all, fmt.Sprintf("%s of lease %x: %s", kv.Key, kv.Lease, kv.Value))
	}
	return strings.Join(all, "\n")
}

// TestOwnKeysStay checks that no request of a client can change the proxies' own keys or end the
// lease of one, and that a delete of all keys keeps them.
func TestOwnKeysStay(t *testing.T) {
	t.Parallel()
	p := newPolicySite(t)
	conn, ctx := p.as(t, "allowed"), t.Context()
	kv, leases, elections, locks := pb.NewKVClient(conn), pb.NewLeaseClient(conn), v3electionpb.NewElectionClient(conn), v3lockpb.NewLockClient(conn)
	granted, err := leases.LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: 600})
	if err != nil {
		t.Fatal(err)
	}
	there := p.own(t)
	key := []byte(agreement)
	keep := &pb.PutRequest{Key: key, IgnoreValue: true, Lease: granted.ID}
	putOp := &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: keep}}
	delOp := &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: &pb.DeleteRangeRequest{Key: key}}}
	nested := func(op *pb.RequestOp) *pb.RequestOp {
		return &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Failure: []*pb.RequestOp{op}, Compare: []*pb.Compare{{Key: key}}}}}
	}
	leader := &v3electionpb.LeaderKey{Name: []byte("/etcd-kms-proxy"), Key: key, Rev: 1, Lease: granted.ID}
	for what, call := range map[string]func() error{
		"put":                    func() error { _, err := kv.Put(ctx, &pb.PutRequest{Key: key, Value: []byte("{}")}); return err },
		"put that keeps a value": func() error { _, err := kv.Put(ctx, keep); return err },
		"delete":                 func() error { _, err := kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: key}); return err },
		"delete of the prefix": func() error {
			_, err := kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte("/etcd-kms-proxy/"), RangeEnd: []byte("/etcd-kms-proxy0")})
			return err
		},
		"delete from one on": func() error {
			_, err := kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: key, RangeEnd: []byte{0}})
			return err
		},
		"transaction": func() error { _, err := kv.Txn(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{putOp}}); return err },
		"nested transaction": func() error {
			_, err := kv.Txn(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{nested(nested(putOp))}})
			return err
		},
		"deleting transaction": func() error {
			_, err := kv.Txn(ctx, &pb.TxnRequest{Failure: []*pb.RequestOp{nested(delOp)}})
			return err
		},
		"campaign": func() error {
			_, err := elections.Campaign(ctx, &v3electionpb.CampaignRequest{Name: []byte("/etcd-kms-proxy"), Lease: granted.ID})
			return err
		},
		"proclaim": func() error {
			_, err := elections.Proclaim(ctx, &v3electionpb.ProclaimRequest{Leader: leader, Value: []byte("x")})
			return err
		},
		"resign": func() error { _, err := elections.Resign(ctx, &v3electionpb.ResignRequest{Leader: leader}); return err },
		"lock": func() error {
			_, err := locks.Lock(ctx, &v3lockpb.LockRequest{Name: []byte("/etcd-kms-proxy/proxies")})
			return err
		},
		"unlock": func() error { _, err := locks.Unlock(ctx, &v3lockpb.UnlockRequest{Key: key}); return err },
		"revoke": func() error { _, err := leases.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: p.lease}); return err },
	} {
		if err := call(); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v", what, err)
		}
		if now := p.own(t); now != there {
			t.Fatalf("%s changed them from\n%s\nto\n%s", what, there, now)
		}
	}
	// Other leases, locks and elections must work.
	if _, err := kv.Put(ctx, &pb.PutRequest{Key: []byte("/leased"), Value: []byte("v"), Lease: granted.ID}); err != nil {
		t.Error(err)
	}
	if l, err := locks.Lock(ctx, &v3lockpb.LockRequest{Name: []byte("/etcd-kms-proxy-not"), Lease: granted.ID}); err != nil {
		t.Error(err)
	} else if _, err := locks.Unlock(ctx, &v3lockpb.UnlockRequest{Key: l.Key}); err != nil {
		t.Error(err)
	}
	if _, err := leases.LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: granted.ID}); err != nil {
		t.Error(err)
	}
	if got := p.get(t, "/leased"); got != "" {
		t.Errorf("a key of a revoked lease holds %q", got)
	}

	everything := &pb.DeleteRangeRequest{Key: []byte{0}, RangeEnd: []byte{0}, PrevKv: true}
	for what, remove := range map[string]func() (*pb.DeleteRangeResponse, error){
		"a delete": func() (*pb.DeleteRangeResponse, error) { return kv.DeleteRange(ctx, everything) },
		"a delete in a transaction": func() (*pb.DeleteRangeResponse, error) {
			op := &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: everything}}
			r, err := kv.Txn(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{nested(op)}, Compare: []*pb.Compare{{Key: []byte("/none"), Target: pb.Compare_CREATE, TargetUnion: &pb.Compare_CreateRevision{}}}})
			if err != nil {
				return nil, err
			}
			return r.Responses[0].GetResponseTxn().GetResponses()[0].GetResponseDeleteRange(), nil
		},
	} {
		for _, k := range []string{"/a", "/z", prefix + "k"} {
			if _, err := kv.Put(ctx, &pb.PutRequest{Key: []byte(k), Value: []byte("v")}); err != nil {
				t.Fatal(err)
			}
		}
		r, err := remove()
		if err != nil || r.Deleted != 3 || len(r.PrevKvs) != 3 || string(r.PrevKvs[1].Value) != "v" {
			t.Errorf("%s of everything: %v, %v", what, r, err)
		}
		if now := p.own(t); now != there {
			t.Errorf("%s of everything changed them from\n%s\nto\n%s", what, there, now)
		}
	}
	p.proxy.Stop(within) // otherwise the address is in use
	plain := p.cfg.Rules[0]
	plain.WriteWith = "plaintext"
	p.refused(t, "weak", p.with(plain), "would be written as plaintext")
}

// TestCiphertextClientsOnlyRead checks that ciphertext clients can do what a backup needs, and
// cannot change etcd, over gRPC and the JSON gateway.
func TestCiphertextClientsOnlyRead(t *testing.T) {
	t.Parallel()
	p := newPolicySite(t)
	ctx := t.Context()
	if _, err := pb.NewKVClient(p.as(t, "allowed")).Put(ctx, &pb.PutRequest{Key: []byte(prefix + "k"), Value: []byte(p.Sealed.Value("v"))}); err != nil {
		t.Fatal(err)
	}
	conn := p.as(t, "backup")
	kv, auth, cluster, maintenance := pb.NewKVClient(conn), pb.NewAuthClient(conn), pb.NewClusterClient(conn), pb.NewMaintenanceClient(conn)
	before, err := p.kv.Range(ctx, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
	if err != nil {
		t.Fatal(err)
	}
	for what, call := range map[string]func() error{
		"put": func() error {
			_, err := kv.Put(ctx, &pb.PutRequest{Key: []byte("/clear"), Value: []byte("v")})
			return err
		},
		"delete": func() error {
			_, err := kv.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte(agreement)})
			return err
		},
		"compact": func() error {
			_, err := kv.Compact(ctx, &pb.CompactionRequest{Revision: before.Header.Revision})
			return err
		},
		"user": func() error {
			_, err := auth.UserAdd(ctx, &pb.AuthUserAddRequest{Name: "u", Password: "p"})
			return err
		},
		"role": func() error { _, err := auth.RoleAdd(ctx, &pb.AuthRoleAddRequest{Name: "r"}); return err },
		"member": func() error {
			_, err := cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:1"}})
			return err
		},
		"lease": func() error {
			_, err := pb.NewLeaseClient(conn).LeaseGrant(ctx, &pb.LeaseGrantRequest{TTL: 60})
			return err
		},
		"revoke": func() error {
			_, err := pb.NewLeaseClient(conn).LeaseRevoke(ctx, &pb.LeaseRevokeRequest{ID: p.lease})
			return err
		},
		"defragment": func() error { _, err := maintenance.Defragment(ctx, &pb.DefragmentRequest{}); return err },
		"disarm": func() error {
			_, err := maintenance.Alarm(ctx, &pb.AlarmRequest{Action: pb.AlarmRequest_DEACTIVATE})
			return err
		},
		"lock": func() error {
			_, err := v3lockpb.NewLockClient(conn).Lock(ctx, &v3lockpb.LockRequest{Name: []byte("/l")})
			return err
		},
		"gateway": func() error {
			transport := &http.Transport{TLSClientConfig: p.ca.ClientTLS(p.ca.Client("web", "backup"))}
			defer transport.CloseIdleConnections()
			r, err := http.NewRequestWithContext(ctx, http.MethodPost, "https://"+p.proxy.Address+"/v3/kv/put", strings.NewReader(`{"key":"L2NsZWFy","value":"dg=="}`))
			if err != nil {
				return err
			}
			r.Header.Set("Content-Type", "application/json")
			answer, err := (&http.Client{Transport: transport}).Do(r)
			if err != nil {
				return err
			}
			defer answer.Body.Close()
			if answer.StatusCode == http.StatusForbidden {
				return status.Error(codes.PermissionDenied, "")
			}
			return fmt.Errorf("status %d", answer.StatusCode)
		},
	} {
		if err := call(); status.Code(err) != codes.PermissionDenied {
			t.Errorf("%s: %v", what, err)
		}
	}
	after, err := p.kv.Range(ctx, &pb.RangeRequest{Key: []byte{0}, RangeEnd: []byte{0}})
	if err != nil || after.Header.Revision != before.Header.Revision || len(after.Kvs) != len(before.Kvs) {
		t.Errorf("etcd has changed: %v, %v", after, err)
	}
	for what, call := range map[string]func() error{
		"get": func() error {
			r, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte(prefix + "k")})
			if err == nil && !strings.HasPrefix(string(r.Kvs[0].Value), "k8s:enc:kms:v2:dev:") {
				return fmt.Errorf("it holds %q", r.Kvs[0].Value)
			}
			return err
		},
		"read-only transaction": func() error {
			op := &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte(agreement)}}}
			_, err := kv.Txn(ctx, &pb.TxnRequest{Success: []*pb.RequestOp{op}})
			return err
		},
		"status":  func() error { _, err := maintenance.Status(ctx, &pb.StatusRequest{}); return err },
		"alarms":  func() error { _, err := maintenance.Alarm(ctx, &pb.AlarmRequest{}); return err },
		"members": func() error { _, err := cluster.MemberList(ctx, &pb.MemberListRequest{}); return err },
		"snapshot": func() error {
			ctx, cancel := context.WithCancel(ctx)
			defer cancel()
			s, err := maintenance.Snapshot(ctx, &pb.SnapshotRequest{})
			if err == nil {
				_, err = s.Recv()
			}
			return err
		},
	} {
		if err := call(); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	}
}
