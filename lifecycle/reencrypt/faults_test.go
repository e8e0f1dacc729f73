package reencrypt

import (
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
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/restore"
)

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
