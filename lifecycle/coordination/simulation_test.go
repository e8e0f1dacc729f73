package coordination

import (
	"context"
	"encoding/json"
	"fmt"
	"hash/fnv"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// fleetSimulation is some proxies in front of one etcd.
type fleetSimulation struct {
	t       *testing.T
	cluster *etcdtest.Cluster
	prefix  string

	mu    sync.Mutex
	calls int
	dead  map[string]bool
	seen  map[string][]Member // the announcements that a client has read last
	// how often a client has made a call in this phase: the third one and more meet no fault
	alike    map[string]int
	restored map[string]int
	hook     func(n int, c *etcdtest.Call) etcdtest.Fault
	after    func(c *etcdtest.Call, answer proto.Message)
	keyID    string
	down     bool // the KMS
	stops    map[string]func()
	fleets   map[string]*Fleet
}

func newFleetSimulation(t *testing.T) *fleetSimulation {
	s := &fleetSimulation{
		t: t, cluster: etcdtest.New(t, 1), prefix: DefaultPrefix, dead: make(map[string]bool), seen: make(map[string][]Member), alike: make(map[string]int), restored: make(map[string]int), keyID: "1",
		stops: make(map[string]func()), fleets: make(map[string]*Fleet),
	}
	s.cluster.Intercept, s.cluster.Done = s.intercept, s.done
	return s
}

func (s *fleetSimulation) intercept(c *etcdtest.Call) etcdtest.Fault {
	s.mu.Lock()
	if c.Client == "test" {
		s.mu.Unlock()
		return etcdtest.Fault{}
	}
	if s.dead[c.Client] {
		s.mu.Unlock()
		return etcdtest.Fault{Err: status.Error(codes.Unavailable, "the process has ended")}
	}
	request := fmt.Sprintf("%s %T %v", c.Client, c.Request, c.Request)
	if s.alike[request]++; s.alike[request] > 2 {
		s.mu.Unlock()
		return etcdtest.Fault{}
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

// done holds each record that is written against what the proxy that wrote it had read: all had
// announced these rules.
func (s *fleetSimulation) done(c *etcdtest.Call, answer proto.Message) {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch a := answer.(type) {
	case *pb.RangeResponse:
		r, _ := c.Request.(*pb.RangeRequest)
		if strings.HasSuffix(string(r.GetKey()), "/proxies/") && !r.GetCountOnly() {
			s.seen[c.Client] = nil
			for _, kv := range a.GetKvs() {
				var m Member
				_ = json.Unmarshal(kv.GetValue(), &m) // one that cannot be read announces no rules
				s.seen[c.Client] = append(s.seen[c.Client], m)
			}
		}
	case *pb.TxnResponse:
		r, _ := c.Request.(*pb.TxnRequest)
		if !a.GetSucceeded() || len(r.GetSuccess()) == 0 || !strings.HasSuffix(string(r.GetSuccess()[0].GetRequestPut().GetKey()), "agreement") {
			break
		}
		var record Agreement
		if err := json.Unmarshal(r.GetSuccess()[0].GetRequestPut().GetValue(), &record); err != nil {
			s.t.Errorf("%s wrote a record that cannot be read: %v", c.Client, err)
		}
		for _, m := range s.seen[c.Client] {
			if m.Record != PolicyDigest(record.Policy) {
				s.t.Errorf("%s recorded %s although %s has other rules", c.Client, record.Policy, m.ID)
			}
		}
	}
	if s.after != nil {
		s.after(c, answer)
	}
}

// restores counts the warnings of a restore in a log.
type restores struct {
	slog.Handler
	count func()
}

// Enabled implements [slog.Handler].
func (*restores) Enabled(context.Context, slog.Level) bool { return true }

// Handle implements [slog.Handler].
func (r *restores) Handle(_ context.Context, record slog.Record) error {
	if strings.Contains(record.Message, "as after a restore") {
		r.count()
	}
	return nil
}

// rulesOf are rules that a test calls by a name.
func rulesOf(name string) Policy {
	return Policy{Rules: []byte("rules " + name), Record: fmt.Appendf(nil, `{"rules":%q}`, name), Providers: []string{"main"}}
}

func (s *fleetSimulation) sealer() etcdtest.Sealer {
	s.mu.Lock()
	defer s.mu.Unlock()
	return etcdtest.Sealer{KeyID: s.keyID, Down: func() *keyring.Error {
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.down {
			return &keyring.Error{Kind: keyring.Unavailable, Text: "no answer"}
		}
		return nil
	}}
}

// start starts a proxy.
func (s *fleetSimulation) start(id, rules string) *Fleet {
	return s.startWith(Member{ID: id, Jobs: []string{"work"}}, rules)
}

func (s *fleetSimulation) startWith(self Member, rules string) *Fleet {
	id := self.ID
	f := NewFleet(FleetConfig{
		Client: s.cluster.Client(s.t, id), Prefix: s.prefix, Self: self, ProofSealers: map[string]inventory.Sealer{"main": s.sealer()}, Logger: slog.New(&restores{Handler: slog.DiscardHandler, count: func() { s.mu.Lock(); s.restored[id]++; s.mu.Unlock() }}),
	})
	f.SetPolicy(rulesOf(rules))
	ctx, cancel := context.WithCancel(s.t.Context())
	ended := make(chan struct{})
	go func() { defer close(ended); f.Run(ctx) }()
	s.stops[id], s.fleets[id] = func() { cancel(); <-ended }, f
	return f
}

// stop ends all proxies.
func (s *fleetSimulation) stop() {
	for _, stop := range s.stops {
		stop()
	}
}

// nextPhase has calls meet faults again that were made before.
func (s *fleetSimulation) nextPhase() {
	s.mu.Lock()
	defer s.mu.Unlock()
	clear(s.alike)
}

// crash ends a process without a word.
func (s *fleetSimulation) crash(id string) {
	s.mu.Lock()
	s.dead[id] = true
	s.mu.Unlock()
}

// check holds what is in etcd against proxies that all have the same rules.
func (s *fleetSimulation) check(rules string, alive ...string) {
	s.t.Helper()
	f := NewFleet(FleetConfig{Client: s.cluster.Client(s.t, "test"), Prefix: s.prefix, ProofSealers: map[string]inventory.Sealer{"main": s.sealer()}})
	f.SetPolicy(rulesOf(rules))
	members, err := f.Members(s.t.Context())
	if err != nil || len(members) != len(alive) {
		s.t.Fatalf("%d proxies are announced, want %d: %+v, %v", len(members), len(alive), members, err)
	}
	record, err := f.Agreement(s.t.Context())
	if err != nil || record == nil || string(record.Policy) != string(rulesOf(rules).Record) {
		s.t.Fatalf("the record is %+v, %v, want rules %s", record, err, rules)
	}
	if old, err := f.Verify(s.t.Context(), record, []string{"main"}); old || err != nil {
		s.t.Errorf("the record: old %v, %v", old, err)
	}
	for _, id := range alive {
		if leads := s.fleets[id].Leads("work"); leads != (members[0].ID == id) {
			s.t.Errorf("%s leads: %v, the oldest is %s", id, leads, members[0].ID)
		}
	}
	if err := f.SameRules(s.t.Context()); err != nil {
		s.t.Error(err)
	}
}

// sampleStep is the distance between the calls that a sample of the simulations meets faults at.
const sampleStep = 4

// everyCall simulates a scenario with a fault at a call, for a sample of the calls that it makes
// without faults, or for each of them if COORDINATION_CALLS is "all". Tests sample other calls.
func everyCall(t *testing.T, scenario func(s *fleetSimulation), fault func(s *fleetSimulation, c *etcdtest.Call) etcdtest.Fault) {
	t.Helper()
	from, step := uint32(0), uint32(1)
	if os.Getenv("COORDINATION_CALLS") != "all" {
		h := fnv.New32a()
		_, _ = h.Write([]byte(t.Name())) // a hash returns no error
		from, step = h.Sum32()%sampleStep, sampleStep
	}
	total := 0
	simulate := func(n int) {
		synctest.Test(t, func(t *testing.T) {
			s := newFleetSimulation(t)
			s.hook = func(call int, c *etcdtest.Call) etcdtest.Fault {
				if call != n {
					return etcdtest.Fault{}
				}
				return fault(s, c)
			}
			defer s.stop()
			scenario(s)
			total = max(total, s.calls)
		})
	}
	simulate(-1)
	for n := int(from); n < total; n += int(step) {
		if simulate(n); t.Failed() {
			t.Fatalf("with call %d of %d", n, total)
		}
	}
}

var errAway = status.Error(codes.Unavailable, "connection reset")
