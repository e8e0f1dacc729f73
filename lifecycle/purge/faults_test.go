package purge

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdtest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

const secret = "the old plaintext"

// simulation is an etcd of three members that holds old plaintext.
type simulation struct {
	t       *testing.T
	cluster *etcdtest.Cluster
	rules   *inventory.Rules
	plain   int64 // values of old plaintext
	last    int64 // the revision that replaced the last of them

	mu    sync.Mutex
	calls int
	alike map[string]int
	hook  func(n int, c *etcdtest.Call) etcdtest.Fault
}

func newSimulation(t *testing.T) *simulation {
	s := &simulation{t: t, cluster: etcdtest.New(t, 3), alike: make(map[string]int)}
	s.cluster.CompactTime = 5 * time.Second
	s.cluster.Intercept = func(c *etcdtest.Call) etcdtest.Fault {
		s.mu.Lock()
		request := fmt.Sprintf("%d %T %v", c.Member, c.Request, c.Request)
		if s.alike[request]++; s.alike[request] > 3 { // the same questions while it waits
			s.mu.Unlock()
			return etcdtest.Fault{}
		}
		n, hook := s.calls, s.hook
		s.calls++
		s.mu.Unlock()
		if hook == nil {
			return etcdtest.Fault{}
		}
		return hook(n, c)
	}
	sealer := etcdtest.Sealer{KeyID: "1"}
	s.rules = inventory.NewRules([]inventory.Rule{{Prefix: "/r/", WriteWith: "main", Sealer: sealer}, {Prefix: "/t/", WriteWith: "main", Sealer: sealer}})
	sealed := func(key string) {
		value, _ := sealer.Seal(t.Context(), []byte(key), []byte("new"))
		s.last = s.cluster.Put(key, string(value))
		s.plain++
	}
	s.cluster.Put("/r/before", secret)
	sealed("/r/before")
	s.plain--
	s.cluster.Compact(0) // that one is no longer in the history, and in the files still
	for i := range 5 {
		key := fmt.Sprintf("/%c/%d", "rt"[i%2], i)
		s.cluster.Put(key, secret)
		if i == 3 {
			s.cluster.Delete(key)
			s.last = s.cluster.Store().Rev()
			s.plain++
			continue
		}
		sealed(key)
	}
	last := s.last
	sealed("/r/0") // sealed again
	s.plain--
	s.last = last
	s.cluster.Put("/u/x", "no rule")
	s.cluster.Put("/u/x", "no rule either")
	time.Sleep(time.Minute)
	return s
}

// purge does what the command does.
func (s *simulation) purge(ctx context.Context, settle time.Duration) (History, []Member, error) {
	c := s.cluster.Client(s.t, "purge")
	h, err := ReadHistory(ctx, c, s.rules, func(old *mvccpb.KeyValue) bool { return bytes.Contains(old.Value, []byte(secret)) })
	if err != nil {
		return h, nil, err
	}
	members, err := Members(ctx, c)
	if err != nil {
		return h, members, err
	}
	for _, m := range members {
		if m.Endpoint == "" {
			return h, members, errors.New(m.Why)
		}
	}
	return h, members, h.Remove(ctx, c, members, settle, func(*Member, int64, time.Duration) {})
}

// readable counts old plaintext in a member's file.
func (s *simulation) readable(member int) (n int) {
	for _, v := range s.cluster.Member(member).File() {
		if v.By != 0 && bytes.Contains(v.Value, []byte(secret)) {
			n++
		}
	}
	return n
}

func (s *simulation) check(members []Member, err error) {
	s.t.Helper()
	for i := range 3 {
		clean := err == nil
		for _, m := range members {
			if m.Name == fmt.Sprint("m", i) && m.Unconfirmed != "" {
				clean = false
			}
		}
		if n := s.readable(i); clean && n > 0 {
			s.t.Errorf("member %d holds %d old values in plaintext, which is not reported", i, n)
		}
	}
}

// everyCall runs f once for each call that a purge makes.
func everyCall(t *testing.T, f func(t *testing.T, s *simulation, n int)) {
	t.Helper()
	total := 0
	simulate := func(n int) {
		synctest.Test(t, func(t *testing.T) {
			s := newSimulation(t)
			if n >= 0 {
				f(t, s, n)
				return
			}
			h, members, err := s.purge(t.Context(), time.Minute)
			if err != nil || h.Plaintext != s.plain || h.CompactAt != s.last || len(members) != 3 || members[2].Name != "m0" {
				t.Fatalf("%+v, %+v, %v, want %d values up to revision %d", h, members, err, s.plain, s.last)
			}
			for i := range 3 {
				if s.cluster.Member(i).Defragmented() != 1 {
					t.Errorf("member %d was defragmented %d times", i, s.cluster.Member(i).Defragmented())
				}
			}
			s.check(members, err)
			total = s.calls
		})
	}
	simulate(-1)
	for n := range total {
		if simulate(n); t.Failed() {
			t.Fatalf("with call %d of %d", n, total)
		}
	}
}

// TestFaultAtEveryCall: whatever call fails, applied or not, a purge that reports nothing has
// removed everything, and the next one does.
func TestFaultAtEveryCall(t *testing.T) {
	for _, applied := range []bool{false, true} {
		t.Run(fmt.Sprint("applied ", applied), func(t *testing.T) {
			t.Parallel()
			everyCall(t, func(t *testing.T, s *simulation, n int) {
				s.hook = func(call int, _ *etcdtest.Call) etcdtest.Fault {
					if call != n {
						return etcdtest.Fault{}
					}
					return etcdtest.Fault{Err: status.Error(codes.Unavailable, "connection reset"), Applied: applied}
				}
				_, members, err := s.purge(t.Context(), time.Minute)
				s.check(members, err)
				s.hook = nil
				_, members, err = s.purge(t.Context(), time.Minute)
				if s.check(members, err); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestOthersBetweenCalls: compactions, streams that end and writes of others between any two calls
// leave nothing that is not reported.
func TestOthersBetweenCalls(t *testing.T) {
	for name, other := range map[string]func(s *simulation){
		"compacts":         func(s *simulation) { s.cluster.Compact(0) },
		"compacts a part":  func(s *simulation) { s.cluster.Compact(s.last - 3) },
		"ends the streams": func(s *simulation) { s.cluster.Cut() },
		"writes":           func(s *simulation) { s.cluster.Put("/u/x", "more"); s.cluster.Put("/u/y", "more") },
		"ends the process": nil,
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			everyCall(t, func(t *testing.T, s *simulation, n int) {
				ctx, kill := context.WithCancel(t.Context())
				defer kill()
				s.hook = func(call int, _ *etcdtest.Call) etcdtest.Fault {
					if call == n && other == nil {
						kill()
					} else if call == n {
						other(s)
					}
					return etcdtest.Fault{}
				}
				_, members, err := s.purge(ctx, time.Minute)
				if s.check(members, err); err != nil && other != nil {
					t.Error(err)
				}
				s.hook = nil
				_, members, err = s.purge(t.Context(), time.Minute)
				if s.check(members, err); err != nil {
					t.Error(err)
				}
			})
		})
	}
}

// TestSlowCompaction: a member whose compaction takes too long is named and not defragmented.
func TestSlowCompaction(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		s := newSimulation(t)
		s.cluster.CompactTime = time.Hour
		h, members, err := s.purge(t.Context(), time.Minute)
		if err != nil || h.Plaintext != s.plain {
			t.Fatalf("%+v, %v", h, err)
		}
		for i, m := range members {
			if !strings.Contains(m.Unconfirmed, "within 1m0s") || s.cluster.Member(i).Defragmented() != 0 {
				t.Errorf("%+v", m)
			}
		}
		time.Sleep(2 * time.Hour)
		_, members, err = s.purge(t.Context(), time.Minute)
		if s.check(members, err); err != nil {
			t.Error(err)
		}
	})
}

// TestMembersAreWell: no member is defragmented while another one does not answer or lags behind;
// it goes on once that is over.
func TestMembersAreWell(t *testing.T) {
	t.Parallel()
	for name, ill := range map[string]func(s *simulation, ill bool){
		"does not answer": func(s *simulation, ill bool) {
			s.hook = func(_ int, c *etcdtest.Call) etcdtest.Fault {
				if ill && c.Member == 1 {
					return etcdtest.Fault{Err: status.Error(codes.Unavailable, "away")}
				}
				return etcdtest.Fault{}
			}
		},
		"lags": func(s *simulation, ill bool) { s.cluster.Member(1).SetLag(map[bool]uint64{true: 5000}[ill]) },
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				s := newSimulation(t)
				// each call, also if it is like others
				s.cluster.Intercept = func(c *etcdtest.Call) etcdtest.Fault {
					s.mu.Lock()
					hook := s.hook
					s.mu.Unlock()
					if hook == nil {
						return etcdtest.Fault{}
					}
					return hook(0, c)
				}
				client := s.cluster.ClientOf(t, "purge", "http://member0:2379", "http://member2:2379")
				members, err := Members(t.Context(), client)
				if err != nil {
					t.Fatal(err)
				}
				s.mu.Lock()
				ill(s, true)
				s.mu.Unlock()
				if err := Defragment(t.Context(), client, &members[1]); err == nil || s.cluster.Member(0).Defragmented()+s.cluster.Member(2).Defragmented() > 0 {
					t.Errorf("it was defragmented: %v", err)
				}
				s.mu.Lock()
				ill(s, false)
				s.mu.Unlock()
				if err := Defragment(t.Context(), client, &members[1]); err != nil {
					t.Error(err)
				}
			})
		})
	}
}
