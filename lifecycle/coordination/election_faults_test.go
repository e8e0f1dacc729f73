package coordination

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdtest"
)

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
