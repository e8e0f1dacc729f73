package linear

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	within  = 60 * time.Second
	patient = 3 * time.Second // for one response
	pause   = 5 * time.Millisecond
	direct  = -1 // a client that bypasses the proxies
)

// site is an etcd of three members and two proxies, with a network in front of each of them that
// can be cut.
type site struct {
	*harness.Env
	cluster *harness.Cluster
	proxies []*harness.Proxy
	// what fails together: the networks of a client, from a proxy to a member, from a proxy to all
	// members, from the other members to a member
	links [4][][]*harness.Relay
	etcd  *clientv3.Client // without the networks that fail
}

func newSite(t *testing.T) *site {
	t.Helper()
	s := &site{Env: harness.New(t)}
	s.cluster = s.StartCluster(3, harness.EtcdConfig{Relayed: true})
	for _, r := range s.cluster.Peers {
		s.links[3] = append(s.links[3], []*harness.Relay{r})
	}
	kms := s.LocalKey("dev", 1)
	for n := range 2 {
		var urls []string
		var all []*harness.Relay
		for _, m := range s.cluster.Members {
			r := s.StartRelay(m.Address)
			urls, all = append(urls, r.URL), append(all, r)
			s.links[1] = append(s.links[1], []*harness.Relay{r})
		}
		s.links[2] = append(s.links[2], all)
		p := s.NewProxy(fmt.Sprintf("proxy-%d", n), harness.ProxyConfig{
			Etcd: harness.Upstream{Endpoints: urls}, KMS: []harness.KMSConfig{kms}, Rules: []harness.Rule{
				{Prefix: "/s/", WriteWith: "dev", AllowPlaintextReads: new(false)},
				// where some bypass the proxies
				{Prefix: "/m/", WriteWith: "dev", AllowPlaintextReads: new(true)},
			},
		})
		p.Start()
		s.proxies = append(s.proxies, p)
	}
	s.etcd = library(t, s.cluster.URLs()...)
	return s
}

// rounds runs a test for the requested number of rounds, each with new clients, and until it fails.
func (s *site) rounds(t *testing.T, work func(t *testing.T, round string)) {
	t.Helper()
	n, err := strconv.Atoi(os.Getenv("LINEAR_ROUNDS"))
	if err != nil {
		n = 1
	}
	for round := range n {
		s.links[0] = nil
		if name := strconv.Itoa(round); !t.Run(name, func(t *testing.T) { work(t, name) }) {
			return
		}
	}
}

// reach returns the address of a proxy, or of a member of etcd, for a new client: over its own
// network.
func (s *site) reach(via int) string {
	to := s.cluster.Members[rand.IntN(3)].Address
	if via != direct {
		to = s.proxies[via].Address
	}
	r := s.StartRelay(to)
	s.links[0] = append(s.links[0], []*harness.Relay{r})
	return r.Address
}

// library returns etcd's own client, which reconnects as soon as its server is back.
func library(t *testing.T, endpoints ...string) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: endpoints, Logger: zap.NewNop(), DialOptions: append(harness.SearchErrors(), grpc.WithConnectParams(
		grpc.ConnectParams{MinConnectTimeout: time.Second, Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond}}))})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// first writes a key that does not exist yet. It may send the request more than once, but it is
// applied once.
func (s *site) first(t *testing.T, h *history, key, value string) {
	t.Helper()
	kv := pb.NewKVClient(harness.Dial(t, s.proxies[0].Address, nil))
	call := h.now()
	harness.Eventually(t, within, "the first value", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), patient)
		defer cancel()
		_, err := kv.Txn(ctx, &pb.TxnRequest{
			Compare: []*pb.Compare{{Key: []byte(key), Target: pb.Compare_CREATE, TargetUnion: &pb.Compare_CreateRevision{}}},
			Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte(value)}}}},
		})
		return err
	})
	h.add(record{key: key, in: put{value}, call: call, wrote: value})
}

// round runs clients while everything fails that can. Then it repairs everything, and lets them
// continue until each has had a response since, and enough returns nil.
func (s *site) round(t *testing.T, h *history, clients []func(context.Context), enough func() error) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	defer all.Wait()
	defer stop()
	for id, work := range clients {
		all.Go(func() {
			for ctx.Err() == nil {
				work(ctx)
				sleep(ctx, pause)
			}
		})
		h.answered(id, 0)
	}
	s.fail(t)
	before := h.answers()
	harness.Eventually(t, within, "all clients to continue after all faults have ended", func() error {
		for id, n := range h.answers() {
			if n <= before[id] {
				return fmt.Errorf("client %d got no answer", id)
			}
		}
		return enough()
	})
}

// fail makes processes and networks fail, for the length of a round, and repairs them.
func (s *site) fail(t *testing.T) {
	t.Helper()
	length := 10 * time.Second
	if testing.Short() {
		length = 5 * time.Second
	}
	ctx, stop := context.WithTimeout(t.Context(), length)
	defer stop()
	var networks sync.WaitGroup
	defer networks.Wait()
	var cuts [4]atomic.Int32
	for range 2 {
		networks.Go(func() {
			for sleep(ctx, between(50, 300)) {
				kind := rand.IntN(len(s.links))
				group, link := s.links[kind][rand.IntN(len(s.links[kind]))], harness.Link(1+rand.IntN(3))
				cuts[kind].Add(1)
				for _, r := range group {
					r.Set(link)
				}
				sleep(ctx, between(100, 1000))
				for _, r := range group {
					r.Set(harness.Whole)
				}
			}
		})
	}
	kills, moves, pauses := 0, 0, 0
	for sleep(ctx, between(200, 800)) { // a random moment is the point
		switch p, m := s.proxies[rand.IntN(2)], s.cluster.Members[rand.IntN(3)]; rand.IntN(6) {
		case 0:
			kills++
			p.Kill()
			p.Start()
		case 1:
			kills++
			m.Kill()
			m.Start()
		case 2:
			pauses++
			halt(t, p.Process, between(100, 1000))
		case 3: // the leader may believe for a moment that it still leads
			pauses++
			halt(t, s.cluster.Leader().Process, between(500, 2000))
		default:
			moves++
			s.moveLeader()
		}
	}
	networks.Wait()
	t.Logf("%d kills, %d pauses, the leader moved %d times; networks failed: %d of clients, %d of proxies to one member, %d to all, %d between members",
		kills, pauses, moves, cuts[0].Load(), cuts[1].Load(), cuts[2].Load(), cuts[3].Load())
}

// halt stops a process for a while, like the migration of a virtual machine.
func halt(t *testing.T, p *harness.Process, d time.Duration) {
	t.Helper()
	if err := syscall.Kill(p.PID(), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	time.Sleep(d) // not shortened: the next one must not begin earlier
	if err := syscall.Kill(p.PID(), syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
}

// moveLeader asks the leader to transfer leadership, if there is one.
func (s *site) moveLeader() {
	leader := s.cluster.Leader()
	conn := harness.Dial(s.TB, leader.Address, nil)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(context.Background(), patient)
	defer cancel()
	members, err := pb.NewClusterClient(conn).MemberList(ctx, &pb.MemberListRequest{})
	if err != nil {
		return
	}
	to := members.Members[rand.IntN(len(members.Members))].ID
	// it may be the leader, or down
	_, _ = pb.NewMaintenanceClient(conn).MoveLeader(ctx, &pb.MoveLeaderRequest{TargetID: to})
}

func between(from, to int) time.Duration {
	return time.Duration(from+rand.IntN(to-from)) * time.Millisecond
}

// sleep waits, and reports whether ctx has not ended.
func sleep(ctx context.Context, d time.Duration) bool {
	select {
	case <-ctx.Done():
		return false
	case <-time.After(d):
		return true
	}
}
