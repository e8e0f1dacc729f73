package reencrypt

import (
	"context"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdtest"
)

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
