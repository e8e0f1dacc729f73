package coordination

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"hash/fnv"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// settled is when a fleet has found its order again after anything that befell it once.
const settled = leaseSeconds*time.Second + fleetCheck + 10*time.Second

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
	f := NewFleet(FleetConfig{
		Client: s.cluster.Client(s.t, id), Prefix: s.prefix, Self: Member{ID: id}, ProofSealers: map[string]inventory.Sealer{"main": s.sealer()}, Logger: slog.New(&restores{Handler: slog.DiscardHandler, count: func() { s.mu.Lock(); s.restored[id]++; s.mu.Unlock() }}),
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
		if leads := s.fleets[id].Leader(); leads != (members[0].ID == id) {
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

// rollOut has two proxies agree on rules, and changes them one after the other.
func rollOut(s *fleetSimulation) {
	for _, id := range []string{"a", "b"} {
		s.start(id, "old")
	}
	time.Sleep(settled)
	s.check("old", "a", "b")
	s.nextPhase()
	for _, id := range []string{"a", "b"} {
		s.fleets[id].SetPolicy(rulesOf("new"))
		time.Sleep(time.Second)
	}
	time.Sleep(settled)
	s.check("new", "a", "b")
}

// TestRollOutWithFaults: whatever call fails, applied or not, rules are on record once all proxies
// have them and not before.
func TestRollOutWithFaults(t *testing.T) {
	for _, applied := range []bool{false, true} {
		for _, failure := range []error{errAway, rpctypes.ErrGRPCTimeout} {
			t.Run(fmt.Sprint("applied ", applied, ", ", failure), func(t *testing.T) {
				t.Parallel()
				everyCall(t, rollOut, func(*fleetSimulation, *etcdtest.Call) etcdtest.Fault {
					return etcdtest.Fault{Err: failure, Applied: applied}
				})
			})
		}
	}
}

// TestRollOutWithOthers: streams that end, compactions, leases that are lost and announcements that
// are removed at any call change nothing in the end.
func TestRollOutWithOthers(t *testing.T) {
	for name, other := range map[string]func(s *fleetSimulation){
		"compacts":                func(s *fleetSimulation) { s.cluster.Compact(0) },
		"ends the streams":        func(s *fleetSimulation) { s.cluster.Cut() },
		"removes an announcement": func(s *fleetSimulation) { s.cluster.Delete(DefaultPrefix + "proxies/b") },
		"ends a lease":            func(s *fleetSimulation) { _ = s.cluster.Revoke(1001) },
		"damages the record":      func(s *fleetSimulation) { s.cluster.Put(DefaultPrefix+"agreement", "{") },
		"removes the record":      func(s *fleetSimulation) { s.cluster.Delete(DefaultPrefix + "agreement") },
		"forges the record": func(s *fleetSimulation) {
			s.cluster.Put(DefaultPrefix+"agreement", `{"policy":{"rules":"old"},"by":"nobody","proofs":{"main":"AAAA"}}`)
		},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			everyCall(t, rollOut, func(s *fleetSimulation, _ *etcdtest.Call) etcdtest.Fault { other(s); return etcdtest.Fault{} })
		})
	}
}

// TestRaceForTheRecord: a record that was written since it was read stays, at any call.
func TestRaceForTheRecord(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newFleetSimulation(t)
		raced := false
		var mine *etcdtest.Call
		s.hook = func(_ int, c *etcdtest.Call) etcdtest.Fault {
			if _, ok := c.Request.(*pb.TxnRequest); ok && !raced {
				raced, mine = true, c
				s.cluster.Put(DefaultPrefix+"agreement", `{"policy":{"rules":"of another proxy"}}`)
			}
			return etcdtest.Fault{}
		}
		s.after = func(c *etcdtest.Call, answer proto.Message) {
			if a, ok := answer.(*pb.TxnResponse); ok && c == mine && a.GetSucceeded() {
				t.Error("a record was replaced that had not been read")
			}
		}
		s.start("a", "old")
		time.Sleep(settled)
		synctest.Wait() // the hook has returned
		if !raced {
			t.Error("no record was written")
		}
		s.check("old", "a")
		s.stop()
	})
}

// TestCrashOfAProxy: a process that ends at any call is forgotten when its lease has ended; the
// others go on, and one of them leads.
func TestCrashOfAProxy(t *testing.T) {
	t.Parallel()
	crashed := ""
	everyCall(t, func(s *fleetSimulation) {
		crashed = ""
		for _, id := range []string{"a", "b", "c"} {
			s.start(id, "old")
		}
		time.Sleep(settled)
		var alive []string
		for _, id := range []string{"a", "b", "c"} {
			if id != crashed {
				alive = append(alive, id)
			}
		}
		s.check("old", alive...)
	}, func(s *fleetSimulation, c *etcdtest.Call) etcdtest.Fault {
		crashed = c.Client
		s.crash(c.Client)
		return etcdtest.Fault{Err: errAway}
	})
}

// TestRestore: each proxy notices that etcd was restored, once, and announces itself again; the
// record of the backup is replaced.
func TestRestore(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newFleetSimulation(t)
		s.start("a", "old")
		s.start("b", "old")
		time.Sleep(settled)
		backup := s.cluster.Store().Clone()
		for i := range 20 {
			s.cluster.Put("/other", fmt.Sprint(i))
		}
		s.fleets["a"].SetPolicy(rulesOf("new"))
		s.fleets["b"].SetPolicy(rulesOf("new"))
		time.Sleep(settled)
		s.check("new", "a", "b")
		s.cluster.Restore(backup)
		time.Sleep(settled)
		s.check("new", "a", "b")
		if s.restored["a"] != 1 || s.restored["b"] != 1 {
			t.Errorf("restores that were noticed: %v", s.restored)
		}
		s.stop()
	})
}

// TestVerify: a record is genuine if each of its providers proves it; without a KMS nothing is
// known.
func TestVerify(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newFleetSimulation(t)
		f := s.start("a", "old")
		time.Sleep(settled)
		s.stop()
		read := func() *Agreement {
			r, err := f.Agreement(t.Context())
			if err != nil {
				t.Fatal(err)
			}
			return r
		}
		verify := func(what string, r *Agreement, wantOld bool, want error) {
			t.Helper()
			if old, err := f.Verify(t.Context(), r, []string{"main"}); old != wantOld || !errors.Is(err, want) {
				t.Errorf("%s: old %v, %v, want %v", what, old, err, want)
			}
		}
		verify("as it was written", read(), false, nil)
		forged := read()
		forged.Policy = []byte(`{"rules":"none"}`)
		verify("other rules", forged, false, ErrForged)
		forged = read()
		forged.Proofs["main"], _ = s.sealer().Seal(t.Context(), []byte("/another/key"), []byte("x"))
		verify("a proof of another key", forged, false, ErrForged)
		forged = read()
		forged.Proofs["main"] = []byte("plaintext")
		verify("a proof in plaintext", forged, false, ErrForged)
		forged = read()
		delete(forged.Proofs, "main")
		verify("no proof", forged, false, ErrForged)
		s.down = true
		verify("no KMS", read(), false, ErrUnverified)
		s.down, s.keyID = false, "2"
		f.cfg.ProofSealers["main"] = s.sealer()
		verify("after a rotation", read(), true, nil)
		f = s.start("a", "old")
		time.Sleep(settled)
		verify("once a proxy has written it again", read(), false, nil)
		s.stop()
	})
}

// TestAnotherPrefix: the record of a prefix that is no longer used goes once no proxy is announced
// there, whatever call fails.
func TestAnotherPrefix(t *testing.T) {
	for _, applied := range []bool{false, true} {
		t.Run(fmt.Sprint("applied ", applied), func(t *testing.T) {
			t.Parallel()
			everyCall(t, func(s *fleetSimulation) {
				s.prefix = "/there/"
				s.start("a", "old")
				time.Sleep(settled)
				s.check("old", "a")
				s.prefix = "/here/"
				s.nextPhase()
				b := s.start("b", "old")
				time.Sleep(settled)
				s.check("old", "b")
				client := s.cluster.Client(s.t, "test")
				if there, err := OtherRecords(s.t.Context(), client, "/here/"); err != nil || len(there) != 1 || there[0].Prefix != "/there/" || there[0].Agreement == nil {
					s.t.Fatalf("while a proxy is there: %+v, %v", there, err)
				}
				s.nextPhase()
				s.stops["a"]()
				b.SetPolicy(rulesOf("old"))
				time.Sleep(settled)
				if there, err := OtherRecords(s.t.Context(), client, "/here/"); err != nil || len(there) != 0 {
					s.t.Fatalf("once no proxy is there: %+v, %v", there, err)
				}
				if pointed, err := OtherRecords(s.t.Context(), client, DefaultPrefix); err != nil || len(pointed) != 1 || pointed[0].Prefix != "/here/" {
					s.t.Fatalf("what a proxy of the default prefix finds: %+v, %v", pointed, err)
				}
			}, func(*fleetSimulation, *etcdtest.Call) etcdtest.Fault {
				return etcdtest.Fault{Err: errAway, Applied: applied}
			})
		})
	}
}

// electionSimulation is some candidates for one job.
type electionSimulation struct {
	*fleetSimulation
	working map[string]bool
	jobs    int
	overlap time.Duration // how long two have worked
	since   time.Time
}

// job works for so long, and counts how long two work.
func (s *electionSimulation) job(id string, d time.Duration) func(context.Context) error {
	return func(ctx context.Context) error {
		s.change(id, true)
		defer s.change(id, false)
		select {
		case <-time.After(d):
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	}
}

func (s *electionSimulation) change(id string, works bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if works {
		s.working[id] = true
		s.jobs++
	} else {
		delete(s.working, id)
	}
	if len(s.working) > 1 {
		s.since = time.Now()
	} else if !s.since.IsZero() {
		s.overlap, s.since = s.overlap+time.Since(s.since), time.Time{}
	}
}

func newElectionSimulation(s *fleetSimulation) *electionSimulation {
	return &electionSimulation{fleetSimulation: s, working: make(map[string]bool)}
}

// TestElectionWithFaults: whatever call fails, applied or not, one works at a time, and each that
// retries has its turn.
func TestElectionWithFaults(t *testing.T) {
	for _, applied := range []bool{false, true} {
		t.Run(fmt.Sprint("applied ", applied), func(t *testing.T) {
			t.Parallel()
			everyCall(t, func(fs *fleetSimulation) {
				s := newElectionSimulation(fs)
				var group sync.WaitGroup
				for _, id := range []string{"a", "b", "c"} {
					e := Election{Client: s.cluster.Client(s.t, id), Key: "/job", Self: id}
					group.Go(func() {
						begun := time.Now()
						for e.Run(s.t.Context(), s.job(id, 3*time.Second)) != nil {
							time.Sleep(time.Second)
							if time.Since(begun) > 10*time.Minute {
								s.t.Errorf("%s has no turn", id)
								return
							}
						}
					})
				}
				group.Wait()
				if s.jobs < 3 || s.jobs > 4 || s.overlap > 0 {
					s.t.Errorf("%d worked, two at a time for %s", s.jobs, s.overlap)
				}
			}, func(*fleetSimulation, *etcdtest.Call) etcdtest.Fault {
				return etcdtest.Fault{Err: errAway, Applied: applied}
			})
		})
	}
}

// TestElectionAfterCrash: a process that ends at any call does not count for longer than its lease.
func TestElectionAfterCrash(t *testing.T) {
	for _, applied := range []bool{false, true} {
		t.Run(fmt.Sprint("applied ", applied), func(t *testing.T) {
			t.Parallel()
			everyCall(t, func(fs *fleetSimulation) {
				s := newElectionSimulation(fs)
				first, next := Election{Client: s.cluster.Client(s.t, "first"), Key: "/job", Self: "first"}, Election{Client: s.cluster.Client(s.t, "next"), Key: "/job", Self: "next"}
				var group sync.WaitGroup
				ctx, kill := context.WithTimeout(s.t.Context(), 20*time.Second)
				defer kill()
				// it may have ended
				group.Go(func() { _ = first.Run(ctx, s.job("first", time.Second)) })
				time.Sleep(20 * time.Second)
				group.Wait()
				begun := time.Now()
				if err := next.Run(s.t.Context(), s.job("next", 0)); err != nil {
					s.t.Error(err)
				} else if wait := time.Since(begun); wait > (electionTTL+2)*time.Second {
					s.t.Errorf("it waited for %s", wait)
				}
			}, func(s *fleetSimulation, c *etcdtest.Call) etcdtest.Fault {
				if c.Client != "first" {
					return etcdtest.Fault{}
				}
				s.crash("first")
				return etcdtest.Fault{Err: errAway, Applied: applied}
			})
		})
	}
}

// TestElectionLost: a process that etcd no longer hears of stops working before, or soon after,
// another one begins.
func TestElectionLost(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newElectionSimulation(newFleetSimulation(t))
		away := Election{Client: s.cluster.Client(t, "away"), Key: "/job", Self: "away"}
		var told []string
		other := Election{Client: s.cluster.Client(t, "other"), Key: "/job", Self: "other", Waiting: func(holder string) { told = append(told, holder) }}
		impatient := Election{Client: s.cluster.Client(t, "impatient"), Key: "/job", Self: "impatient", NoWait: true}
		var group sync.WaitGroup
		group.Go(func() {
			if err := away.Run(t.Context(), s.job("away", time.Hour)); !errors.Is(err, ErrLeadershipLost) {
				t.Errorf("it ended with %v", err)
			}
		})
		time.Sleep(time.Minute)
		group.Go(func() {
			if err := other.Run(t.Context(), s.job("other", time.Minute)); err != nil {
				t.Error(err)
			}
		})
		time.Sleep(time.Minute)
		if err := impatient.Run(t.Context(), s.job("impatient", 0)); !errors.Is(err, ErrOtherLeader) || !strings.Contains(err.Error(), "away") {
			t.Errorf("without waiting: %v", err)
		}
		s.crash("away")
		group.Wait()
		synctest.Wait()
		if s.jobs != 2 || s.overlap > 2*time.Second || len(told) != 1 || told[0] != "away" {
			t.Errorf("%d worked, two at a time for %s; told of %q", s.jobs, s.overlap, told)
		}
	})
}
