// Package members tests what clients learn about etcd's members, and how they reach a particular
// one, with a real cluster and real clients.
package members

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const within = 30 * time.Second

// site is a cluster of three members, and a proxy with a listener for all members and one for each.
type site struct {
	*harness.Env
	cluster *harness.Cluster
	proxy   *harness.Proxy
	all     string
	each    []string // URLs, in the order of the members
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{Env: harness.New(t)}
	s.cluster = s.StartCluster(3, harness.EtcdConfig{})
	s.all = "http://" + harness.FreeAddress(t)
	cfg := harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: s.cluster.URLs()}, KMS: []harness.KMSConfig{s.LocalKey("dev", 1)}, Rules: []harness.Rule{{Prefix: "/s/", WriteWith: "dev"}},
		Listeners: []harness.Listener{{Address: strings.TrimPrefix(s.all, "http://"), AdvertiseClientURLs: []string{s.all}}},
	}
	for _, m := range s.cluster.Members {
		own := "http://" + harness.FreeAddress(t)
		s.each = append(s.each, own)
		cfg.Listeners = append(cfg.Listeners, harness.Listener{Address: strings.TrimPrefix(own, "http://"), AdvertiseClientURLs: []string{own}, Endpoint: m.URL})
	}
	s.proxy = s.StartProxy("proxy", cfg)
	s.proxy.WaitReady(within)
	return s
}

// TestURLs checks that a client learns only the proxy's URLs, and that AutoSync keeps it on the
// proxy.
func TestURLs(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	client, err := clientv3.New(clientv3.Config{Endpoints: []string{s.all}, Logger: zap.NewNop(), DialTimeout: within, DialOptions: harness.SearchErrors()})
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	if err := client.Sync(t.Context()); err != nil {
		t.Fatal(err)
	}
	got, want := slices.Sorted(slices.Values(client.Endpoints())), slices.Sorted(slices.Values(s.each))
	if !slices.Equal(got, want) {
		t.Errorf("after Sync: %v, want %v", got, want)
	}
	value := s.Sealed.Value("synced")
	if _, err := client.Put(t.Context(), "/s/key", value); err != nil {
		t.Fatal(err)
	}
	if r, err := client.Get(t.Context(), "/s/key"); err != nil || len(r.Kvs) != 1 || string(r.Kvs[0].Value) != value {
		t.Errorf("after Sync: %v, %v", r, err)
	}

	// Every response that names members, including members that have not started yet.
	conn := harness.Dial(t, strings.TrimPrefix(s.all, "http://"), nil)
	cluster := pb.NewClusterClient(conn)
	own := s.cluster.URLs()
	foreign := func(what string, members []*pb.Member) {
		t.Helper()
		for _, m := range members {
			for _, u := range m.ClientURLs {
				if slices.Contains(own, u) {
					t.Errorf("%s names %s", what, u)
				}
			}
		}
	}
	var added *pb.MemberAddResponse
	harness.Eventually(t, within, "etcd to take a member: all have to be known as healthy for a while", func() (err error) {
		added, err = cluster.MemberAdd(t.Context(), &pb.MemberAddRequest{PeerURLs: []string{"http://127.0.0.1:1"}, IsLearner: true})
		return err
	})
	foreign("MemberAdd", append(added.Members, added.Member))
	if len(added.Member.ClientURLs) != 0 || len(added.Members) != 4 {
		t.Errorf("a member that has not started: %v", added)
	}
	updated, err := cluster.MemberUpdate(t.Context(), &pb.MemberUpdateRequest{ID: added.Member.ID, PeerURLs: []string{"http://127.0.0.1:2"}})
	if err != nil {
		t.Fatal(err)
	}
	foreign("MemberUpdate", updated.Members)
	removed, err := cluster.MemberRemove(t.Context(), &pb.MemberRemoveRequest{ID: added.Member.ID})
	if err != nil {
		t.Fatal(err)
	}
	foreign("MemberRemove", removed.Members)
	// The same over JSON.
	answer, err := http.Post(s.all+"/v3/cluster/member/list", "application/json", strings.NewReader("{}"))
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil || strings.Contains(string(body), own[0]) || !strings.Contains(string(body), s.each[0]) {
		t.Errorf("%s, %v", body, err)
	}
}

// TestEtcdctl checks that etcdctl sees each member behind one proxy, including members that are
// down.
func TestEtcdctl(t *testing.T) {
	t.Parallel()
	s := newSite(t)
	status := func() (ids []uint64, failed bool) {
		t.Helper()
		cmd := exec.Command(harness.Bin(t, "etcdctl-3.7"), "--endpoints", s.all, "--write-out", "json", "--command-timeout", "10s", "endpoint", "status", "--cluster")
		out, err := cmd.Output()
		if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
			t.Fatal(err)
		}
		var list []struct {
			Endpoint string
			Status   pb.StatusResponse
		}
		if err := json.Unmarshal(out, &list); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		for i := range list {
			e := &list[i]
			ids = append(ids, e.Status.Header.MemberId)
			if !slices.Contains(s.each, e.Endpoint) {
				t.Errorf("an endpoint is %s", e.Endpoint)
			}
		}
		return ids, err != nil
	}
	ids, failed := status()
	slices.Sort(ids)
	if failed || len(slices.Compact(ids)) != 3 {
		t.Errorf("%d members", len(ids))
	}
	// A request to a particular member is executed there.
	for i, own := range s.each {
		conn := harness.Dial(t, strings.TrimPrefix(own, "http://"), nil)
		direct := harness.Dial(t, s.cluster.Members[i].Address, nil)
		through, err := pb.NewMaintenanceClient(conn).Status(t.Context(), &pb.StatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if want, err := pb.NewMaintenanceClient(direct).Status(t.Context(), &pb.StatusRequest{}); err != nil || want.Header.MemberId != through.Header.MemberId {
			t.Errorf("listener %d leads to %x: %v, %v", i, through.Header.MemberId, want, err)
		}
	}
	s.cluster.Members[2].Stop(within)
	if ids, failed := status(); !failed || len(ids) != 2 {
		t.Errorf("with one member down: %d answer, failed %t", len(ids), failed)
	}
	harness.Eventually(t, within, "health of each member", func() error {
		for i, want := range []int{200, 200, 502} {
			answer, err := http.Get(s.each[i] + "/health")
			if err != nil {
				return err
			}
			answer.Body.Close()
			if answer.StatusCode != want {
				return fmt.Errorf("listener %d: HTTP %d, want %d", i, answer.StatusCode, want)
			}
		}
		return nil
	})
}
