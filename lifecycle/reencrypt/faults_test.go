package reencrypt

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

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
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/restore"
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

// TestFaultAtEveryCall: whatever call fails, applied or not, the run ends with all values current,
// and counts what it wrote.
func TestFaultAtEveryCall(t *testing.T) {
	for name, tune := range map[string]func(*Config){"one value a transaction": nil, "three values a transaction": func(c *Config) { c.TxnKeys = 3 }} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, failure := range retryable {
				for _, applied := range []bool{false, true} {
					everyCall(t, tune, func(t *testing.T, s *simulation, n int, run func(string) (Result, error)) {
						s.hook = func(call int, _ *etcdtest.Call) etcdtest.Fault {
							if call != n {
								return etcdtest.Fault{}
							}
							return etcdtest.Fault{Err: failure, Applied: applied}
						}
						result, err := run("first")
						if err != nil || result.Rewritten != s.written() || result.Rewritten != 9 {
							t.Errorf("%v, applied %v: %+v, %v; %d written", failure, applied, result, err, s.written())
						}
						s.checkDone()
					})
				}
			}
		})
	}
}

// TestCrashAtEveryCall: a process that ends at any call leaves each value as it was or as it is to
// be, and the next one finishes.
func TestCrashAtEveryCall(t *testing.T) {
	t.Parallel()
	for _, applied := range []bool{false, true} {
		everyCall(t, nil, func(t *testing.T, s *simulation, n int, _ func(string) (Result, error)) {
			ctx, kill := context.WithCancel(t.Context())
			s.hook = func(call int, c *etcdtest.Call) etcdtest.Fault {
				if call != n {
					return etcdtest.Fault{}
				}
				s.mu.Lock()
				s.dead[c.Client] = true
				s.mu.Unlock()
				kill()
				return etcdtest.Fault{Err: status.Error(codes.Unavailable, "the process has ended"), Applied: applied}
			}
			first, err := Run(ctx, s.config(s.cluster.Client(t, "first")))
			if err != nil && !errors.Is(err, context.Canceled) {
				t.Errorf("the first: %v", err)
			}
			s.check()
			second, err := Run(t.Context(), s.config(s.cluster.Client(t, "second")))
			if err != nil || second.Unfinished() != 0 || s.written() != 9 || first.Rewritten+second.Rewritten > 9 {
				t.Errorf("the second: %+v, %v; %d written", second, err, s.written())
			}
			s.checkDone()
		})
	}
}

// TestOthersBetweenCalls: what others do between any two calls wins, whatever it is.
func TestOthersBetweenCalls(t *testing.T) {
	others := map[string]func(s *simulation){
		"writes plaintext": func(s *simulation) { s.cluster.Put("/r/k21", "new") },
		"writes the same":  func(s *simulation) { s.cluster.Put("/r/k21", "value of /r/k21") },
		"writes another's": func(s *simulation) { s.cluster.Put("/r/k00", "new") },
		"writes as the rule does": func(s *simulation) {
			value, _ := s.sealer.Seal(s.t.Context(), []byte("/r/k21"), []byte("new"))
			s.cluster.Put("/r/k21", string(value))
		},
		"deletes":               func(s *simulation) { s.cluster.Delete("/r/k21") },
		"deletes and recreates": func(s *simulation) { s.cluster.Delete("/r/k21"); s.cluster.Put("/r/k21", "new") },
		"deletes the last":      func(s *simulation) { s.cluster.Delete("/r/k39") },
		"the lease expires":     func(s *simulation) { _ = s.cluster.Revoke(simulatedID) },
		"takes the lease away":  func(s *simulation) { s.cluster.Put(leasedKey, "new") },
		"gives a lease": func(s *simulation) {
			_, _ = s.cluster.Do(&pb.PutRequest{Key: []byte("/r/k21"), Value: []byte("new"), Lease: simulatedID})
		},
		"compacts": func(s *simulation) { s.cluster.Compact(0) },
		"writes and compacts": func(s *simulation) {
			s.cluster.Put("/r/k21", "new")
			s.cluster.Put("/r/k38", "new")
			s.cluster.Compact(0)
		},
		"ends the streams": func(s *simulation) { s.cluster.Cut() },
	}
	for name, other := range others {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			for _, txnKeys := range []int{1, 4} {
				everyCall(t, func(c *Config) { c.TxnKeys = txnKeys }, func(t *testing.T, s *simulation, n int, run func(string) (Result, error)) {
					s.hook = func(call int, _ *etcdtest.Call) etcdtest.Fault {
						if call == n {
							other(s)
						}
						return etcdtest.Fault{}
					}
					result, err := run("first")
					if err != nil || result.Unfinished() != 0 || result.Rewritten != s.written() {
						t.Errorf("%+v, %v; %d written", result, err, s.written())
					}
					// What was written behind the last pass is for the next run.
					again, err := run("second")
					if err != nil || again.Unfinished() != 0 {
						t.Errorf("again: %+v, %v", again, err)
					}
					s.checkDone()
				})
			}
		})
	}
}

// TestOthersAndFault: others write while the answer of a transaction is lost.
func TestOthersAndFault(t *testing.T) {
	t.Parallel()
	for _, applied := range []bool{false, true} {
		everyCall(t, func(c *Config) { c.TxnKeys = 2 }, func(t *testing.T, s *simulation, n int, run func(string) (Result, error)) {
			s.hook = func(call int, c *etcdtest.Call) etcdtest.Fault {
				if call == n+1 {
					for _, k := range []string{"/r/k05", "/r/k21", "/r/k35"} {
						s.cluster.Put(k, "new")
					}
				}
				if call != n {
					return etcdtest.Fault{}
				}
				return etcdtest.Fault{Err: rpctypes.ErrGRPCTimeout, Applied: applied}
			}
			if result, err := run("first"); err != nil || result.Unfinished() != 0 {
				t.Errorf("%+v, %v", result, err)
			}
			if again, err := run("second"); err != nil || again.Unfinished() != 0 {
				t.Errorf("again: %+v, %v", again, err)
			}
			s.checkDone()
		})
	}
}

// TestRestoreBetweenCalls: a restore of etcd at any call ends the run, or comes after it, and never
// lets it write what was read before into what is there now.
func TestRestoreBetweenCalls(t *testing.T) {
	t.Parallel()
	everyCall(t, nil, func(t *testing.T, s *simulation, n int, run func(string) (Result, error)) {
		s.hook = func(call int, _ *etcdtest.Call) etcdtest.Fault {
			if call != n {
				return etcdtest.Fault{}
			}
			s.mu.Lock()
			clear(s.ours)
			s.mu.Unlock()
			s.cluster.Restore(s.backup)
			// At the revision at which the run may have read another value of this key.
			s.cluster.Put("/r/k39", "written after the restore")
			return etcdtest.Fault{Err: status.Error(codes.Unavailable, "etcd is restored")}
		}
		if result, err := run("first"); err != nil && !errors.Is(err, restore.ErrRestored) {
			t.Errorf("%+v, %v", result, err)
		}
		s.check()
		if again, err := run("second"); err != nil || again.Unfinished() != 0 {
			t.Errorf("again: %+v, %v", again, err)
		}
		s.checkDone()
	})
}

// TestSeveralRuns: of several at a time one works, and each waits for its turn; together they write
// each value once.
func TestSeveralRuns(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSimulation(t)
		var group sync.WaitGroup
		var working, most int
		var mu sync.Mutex
		for i := range 3 {
			c := s.config(s.cluster.Client(t, fmt.Sprint("run ", i)))
			c.Check = func(ctx context.Context) error {
				mu.Lock()
				working++
				most = max(most, working)
				mu.Unlock()
				err := sleep(ctx, time.Second)
				mu.Lock()
				working--
				mu.Unlock()
				return err
			}
			group.Go(func() {
				if result, err := Run(t.Context(), c); err != nil || result.Unfinished() != 0 {
					t.Errorf("%+v, %v", result, err)
				}
			})
		}
		group.Wait()
		if most != 1 || s.written() != 9 {
			t.Errorf("%d at a time, %d written", most, s.written())
		}
		s.check()
		s.checkDone()
	})
}

// TestRefusals: what etcd refuses is sent in smaller parts, waited for, or left with its reason,
// whatever etcd says.
func TestRefusals(t *testing.T) {
	t.Parallel()
	puts := func(c *etcdtest.Call) (keys []string) {
		r, _ := c.Request.(*pb.TxnRequest)
		for _, op := range r.GetSuccess() {
			if p := op.GetRequestPut(); p != nil && strings.HasPrefix(string(p.GetKey()), "/r/") {
				keys = append(keys, string(p.GetKey()))
			}
		}
		return keys
	}
	for name, test := range map[string]struct {
		refuse func(c *etcdtest.Call, keys []string, since time.Duration) error
		left   string // the key that is left, and why
		why    string
	}{
		"too many operations": {refuse: func(_ *etcdtest.Call, keys []string, _ time.Duration) error {
			if len(keys) > 2 {
				return rpctypes.ErrGRPCTooManyOps
			}
			return nil
		}},
		"too large together": {refuse: func(c *etcdtest.Call, _ []string, _ time.Duration) error {
			if proto.Size(c.Request) > 400 {
				return rpctypes.ErrGRPCRequestTooLarge
			}
			return nil
		}},
		"one too large": {refuse: func(_ *etcdtest.Call, keys []string, _ time.Duration) error {
			if slices.Contains(keys, "/r/k21") {
				return rpctypes.ErrGRPCRequestTooLarge
			}
			return nil
		}, left: "/r/k21", why: "too large"},
		"one too large for gRPC": {refuse: func(_ *etcdtest.Call, keys []string, _ time.Duration) error {
			if slices.Contains(keys, "/r/k21") {
				return status.Error(codes.ResourceExhausted, "grpc: received message larger than max (2 vs. 1)")
			}
			return nil
		}, left: "/r/k21", why: "too large"},
		"a lease that etcd has lost": {refuse: func(_ *etcdtest.Call, keys []string, _ time.Duration) error {
			if slices.Contains(keys, leasedKey) {
				return rpctypes.ErrGRPCLeaseNotFound
			}
			return nil
		}, left: leasedKey, why: "lease"},
		"a lease of other keys": {refuse: func(_ *etcdtest.Call, keys []string, _ time.Duration) error {
			if slices.Contains(keys, leasedKey) {
				return rpctypes.ErrGRPCPermissionDenied
			}
			return nil
		}, left: leasedKey, why: "lease"},
		"no space": {refuse: func(_ *etcdtest.Call, keys []string, since time.Duration) error {
			if len(keys) > 0 && since < time.Minute {
				return rpctypes.ErrGRPCNoSpace
			}
			return nil
		}},
		"an outage": {refuse: func(c *etcdtest.Call, _ []string, since time.Duration) error {
			if since > 0 && since < 5*time.Minute {
				return status.Error(codes.Unavailable, "etcd is away")
			}
			return nil
		}},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			synctest.Test(t, func(t *testing.T) {
				s, begun := newSimulation(t), time.Now()
				s.hook = func(_ int, c *etcdtest.Call) etcdtest.Fault {
					return etcdtest.Fault{Err: test.refuse(c, puts(c), time.Since(begun))}
				}
				c := s.config(s.cluster.Client(t, "first"))
				c.TxnKeys = 5
				result, err := Run(t.Context(), c)
				if err != nil || result.Rewritten != s.written() {
					t.Fatalf("%+v, %v; %d written", result, err, s.written())
				}
				s.check()
				if test.left == "" {
					s.checkDone()
				}
				if left := result.Skipped; len(left) != min(1, len(test.left)) || len(left) == 1 && (left[0].Key != test.left || !strings.Contains(left[0].Why, test.why)) {
					t.Errorf("left %v, want %q", left, test.left)
				}
			})
		})
	}
}

// TestLoop: there is a run at the start, after each change of what values are sealed with, at the
// interval, soon after one that failed or found work, and none while another process leads.
func TestLoop(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSimulation(t)
		var mu sync.Mutex
		var results []Result
		keys, leads, failing := "1", false, false
		backup := s.cluster.Store().Clone()
		s.hook = func(int, *etcdtest.Call) etcdtest.Fault {
			mu.Lock()
			defer mu.Unlock()
			if failing {
				return etcdtest.Fault{Err: rpctypes.ErrGRPCCorrupt}
			}
			return etcdtest.Fault{}
		}
		set := func(change func()) { mu.Lock(); change(); mu.Unlock() }
		loop := Loop{
			Config: s.config(s.cluster.Client(t, "loop")), Interval: time.Hour,
			Keys:   func() string { mu.Lock(); defer mu.Unlock(); return keys },
			Leader: func() bool { mu.Lock(); defer mu.Unlock(); return leads },
			Ended:  func(r Result, _ error) { set(func() { results = append(results, r) }) },
		}
		ctx, stop := context.WithCancel(t.Context())
		ended := make(chan struct{})
		go func() { defer close(ended); loop.Run(ctx) }()
		want := func(what string, n int) {
			t.Helper()
			mu.Lock()
			defer mu.Unlock()
			if len(results) != n {
				t.Errorf("%s: %d runs, want %d", what, len(results), n)
			}
		}
		time.Sleep(10 * time.Minute)
		want("another leads", 0)
		set(func() { leads = true })
		time.Sleep(10 * time.Second)
		want("it leads", 1)
		time.Sleep(loopRepeat + 10*time.Second)
		want("it found work", 2)
		time.Sleep(30 * time.Minute)
		want("nothing happened", 2)
		set(func() { keys = "2" })
		time.Sleep(10 * time.Second)
		want("a rotation", 3)
		time.Sleep(time.Hour)
		want("the interval", 4)
		set(func() { keys, failing = "3", true })
		time.Sleep(10 * time.Second)
		want("a run that fails", 5)
		time.Sleep(loopRepeat + 10*time.Second)
		want("again", 6)
		set(func() { failing = false })
		time.Sleep(loopRepeat + 10*time.Second)
		want("etcd is back", 7)
		time.Sleep(loopRepeat + 10*time.Second) // the one that found work
		runs := len(results)
		s.cluster.Put("/other", "x")
		time.Sleep(10 * time.Second)
		s.mu.Lock()
		clear(s.ours) // revisions of the data that is gone
		s.mu.Unlock()
		s.cluster.Restore(backup)
		time.Sleep(10 * time.Second)
		want("a restore", runs+1)
		s.checkDone()
		set(func() { leads = false })
		time.Sleep(3 * time.Hour)
		want("another leads again", runs+1)
		stop()
		<-ended
		s.check()
		s.checkDone()
	})
}

// TestKeysThatAreNotText: a report in JSON has the bytes of a key that is not UTF-8.
func TestKeysThatAreNotText(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSimulation(t)
		foreign, _ := s.sealer.Seal(t.Context(), []byte("/another"), nil)
		for _, key := range []string{"/r/\xff\x00", "/r/größe"} {
			s.cluster.Put(key, string(foreign))
		}
		result, err := Run(t.Context(), s.config(s.cluster.Client(t, "first")))
		if err != nil || len(result.Skipped) != 2 {
			t.Fatalf("%+v, %v", result, err)
		}
		report, err := json.Marshal(result)
		if err != nil || !strings.Contains(string(report), `{"key":"/r/größe","why"`) || !strings.Contains(string(report), `"keyBytes":"L3Iv/wA="`) {
			t.Errorf("%s, %v", report, err)
		}
	})
}

// TestLaterPasses: what others write behind the scan of a pass is found in the next one.
func TestLaterPasses(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSimulation(t)
		written := false
		s.hook = func(_ int, c *etcdtest.Call) etcdtest.Fault {
			if r, ok := c.Request.(*pb.TxnRequest); ok && !written && strings.HasPrefix(string(r.GetSuccess()[0].GetRequestPut().GetKey()), "/r/k2") {
				written = true
				s.cluster.Put("/r/k00", "behind the scan")
			}
			return etcdtest.Fault{}
		}
		result, err := Run(t.Context(), s.config(s.cluster.Client(t, "first")))
		if err != nil || !written || result.Pass != 3 || result.Rewritten != 10 {
			t.Errorf("%+v, %v", result, err)
		}
		s.check()
		s.checkDone()
	})
}
