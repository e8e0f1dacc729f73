package reencrypt

import (
	"bytes"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdmodel"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// simulation is an etcd with values of all kinds, and a record of the writes of re-encryption.
type simulation struct {
	t       *testing.T
	cluster *etcdtest.Cluster
	sealer  etcdtest.Sealer
	rules   *inventory.Rules

	mu    sync.Mutex
	calls int             // of clients that re-encrypt
	ours  map[int64]int   // revisions that re-encryption made, and how many values each has
	dead  map[string]bool // clients whose process has ended
	hook  func(n int, c *etcdtest.Call) etcdtest.Fault

	backup *etcdmodel.Store // from before the last key was written
}

// Keys of a simulation.
const (
	simulatedKeys = 40 // more than a first page
	leasedKey     = "/r/k11"
	simulatedID   = 77 // of the lease
)

func newSimulation(t *testing.T) *simulation {
	s := &simulation{t: t, cluster: etcdtest.New(t, 1), sealer: etcdtest.Sealer{KeyID: "2"}, ours: make(map[int64]int), dead: make(map[string]bool)}
	s.rules = inventory.NewRules([]inventory.Rule{{Prefix: "/r/", WriteWith: "main", Sealer: s.sealer}}, "/r/exempt/")
	s.cluster.Intercept, s.cluster.Done = s.intercept, s.done
	if err := s.cluster.Store().Grant(simulatedID); err != nil {
		t.Fatal(err)
	}
	for i := range simulatedKeys {
		key := fmt.Sprintf("/r/k%02d", i)
		value := []byte("value of " + key)
		switch {
		case i%10 == 1: // plaintext; k11 has a lease
		case i%10 == 5 || i == simulatedKeys-1:
			value, _ = etcdtest.Sealer{KeyID: "1"}.Seal(t.Context(), []byte(key), value)
		default:
			value, _ = s.sealer.Seal(t.Context(), []byte(key), value)
		}
		if i == simulatedKeys-1 {
			s.backup = s.cluster.Store().Clone()
		}
		r := &pb.PutRequest{Key: []byte(key), Value: value}
		if key == leasedKey {
			r.Lease = simulatedID
		}
		if _, err := s.cluster.Do(r); err != nil {
			t.Fatal(err)
		}
	}
	s.cluster.Put("/r/exempt/x", "stays plaintext")
	s.cluster.Put("/s/x", "stays plaintext")
	return s
}

func (s *simulation) intercept(c *etcdtest.Call) etcdtest.Fault {
	s.mu.Lock()
	if s.dead[c.Client] {
		s.mu.Unlock()
		return etcdtest.Fault{Err: status.Error(codes.Unavailable, "the process has ended")}
	}
	n := s.calls
	s.calls++
	hook := s.hook
	s.mu.Unlock()
	if hook == nil {
		return etcdtest.Fault{}
	}
	return hook(n, c)
}

// done records what re-encryption wrote under the rules.
func (s *simulation) done(c *etcdtest.Call, answer proto.Message) {
	r, ok := answer.(*pb.TxnResponse)
	if !ok || !r.GetSucceeded() {
		return
	}
	request, _ := c.Request.(*pb.TxnRequest)
	n := 0
	for _, op := range request.GetSuccess() {
		if p := op.GetRequestPut(); p != nil && strings.HasPrefix(string(p.GetKey()), "/r/") {
			n++
		}
	}
	if n > 0 {
		s.mu.Lock()
		defer s.mu.Unlock()
		s.ours[r.GetHeader().GetRevision()] = n
	}
}

func (s *simulation) config(client *clientv3.Client) Config {
	return Config{
		Client: client, Rules: func() *inventory.Rules { return s.rules }, Workers: 1,
		Election: coordination.Election{Client: client, Key: "/coordination/reencrypt", Self: "test"},
	}
}

// written is how many values re-encryption has written.
func (s *simulation) written() (n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, values := range s.ours {
		n += int64(values)
	}
	return n
}

// check holds the history of etcd against what re-encryption may do: it replaces a value by one of
// the same key, plaintext and lease that is current, and brings no deleted key back.
func (s *simulation) check() {
	s.t.Helper()
	s.mu.Lock()
	defer s.mu.Unlock()
	last := make(map[string]int)
	values := s.cluster.Store().Values()
	for i, v := range values {
		key := string(v.Key)
		before, follows := last[key]
		last[key] = i
		if s.ours[v.ModRevision] == 0 || !strings.HasPrefix(key, "/r/") {
			continue
		}
		if !follows || values[before].By != v.ModRevision {
			s.t.Errorf("%s at revision %d: a deleted key was brought back", key, v.ModRevision)
			continue
		}
		was, _, err := s.sealer.Inspect(s.t.Context(), v.Key, values[before].Value)
		if err != nil {
			s.t.Errorf("%s before revision %d: %v", key, v.ModRevision, err)
		}
		now, state, err := s.sealer.Inspect(s.t.Context(), v.Key, v.Value)
		if err != nil || state != keyring.Current || !bytes.Equal(was, now) || v.Lease != values[before].Lease {
			s.t.Errorf("%s at revision %d: %s, %q with lease %d was replaced by %q with lease %d (%v)", key, v.ModRevision, state, was, values[before].Lease, now, v.Lease, err)
		}
		if strings.HasPrefix(key, "/r/exempt/") {
			s.t.Errorf("%s was rewritten, which no rule is for", key)
		}
	}
}

// checkDone reports values that are not current.
func (s *simulation) checkDone() {
	s.t.Helper()
	for _, v := range s.cluster.Store().Values() {
		if v.By != 0 || s.rules.Of(v.Key) == nil {
			continue
		}
		if _, state, err := s.sealer.Inspect(s.t.Context(), v.Key, v.Value); state != keyring.Current {
			s.t.Errorf("%s is %s in the end (%v)", v.Key, state, err)
		}
	}
}

// retryable are errors that pass, as etcd and gRPC report them.
var retryable = []error{rpctypes.ErrGRPCTimeout, status.Error(codes.Unavailable, "connection reset"), status.Error(codes.DeadlineExceeded, "too slow")}

// everyCall runs f once for each call that a run without faults makes, and with at least so many.
func everyCall(t *testing.T, tune func(*Config), f func(t *testing.T, s *simulation, n int, run func(client string) (Result, error))) {
	t.Helper()
	total := 0
	simulate := func(n int) {
		synctest.Test(t, func(t *testing.T) {
			s := newSimulation(t)
			run := func(client string) (Result, error) {
				c := s.config(s.cluster.Client(t, client))
				if tune != nil {
					tune(&c)
				}
				return Run(t.Context(), c)
			}
			if n >= 0 {
				f(t, s, n, run)
				s.check()
				return
			}
			if result, err := run("first"); err != nil || result.Rewritten != 9 || result.Unfinished() != 0 || s.written() != 9 {
				t.Fatalf("%+v, %v; %d written", result, err, s.written())
			}
			total = s.calls
			s.check()
			s.checkDone()
		})
	}
	simulate(-1)
	for n := range total {
		if simulate(n); t.Failed() {
			t.Fatalf("with call %d of %d", n, total)
		}
	}
}
