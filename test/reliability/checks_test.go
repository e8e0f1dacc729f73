package reliability

import (
	"context"
	"fmt"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestChecks damages what clients wrote, like a proxy that loses writes, applies them twice, or
// returns wrong values. The checks must find all of it.
func TestChecks(t *testing.T) {
	s := newSite(t, false)
	l := newLoad(s, prefix+"checks/")
	s.load = l
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	l.start(ctx)
	l.proceed("the start")
	var once []string
	harness.Eventually(t, within, "some writes", func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		once = once[:0]
		for key := range l.acked {
			once = append(once, key)
		}
		if len(once) < 20 || l.counters[0].known < 10 || l.counters[1].known < 10 {
			return fmt.Errorf("%d", len(once))
		}
		return nil
	})
	kv, done := s.kv(0)
	defer done()
	put := func(key, value string) {
		t.Helper()
		if _, err := kv.Put(t.Context(), &pb.PutRequest{Key: []byte(key), Value: []byte(value)}); err != nil {
			t.Fatal(err)
		}
	}
	// A write that is lost, one that is applied twice, one with another value.
	if _, err := kv.DeleteRange(t.Context(), &pb.DeleteRangeRequest{Key: []byte(once[0])}); err != nil {
		t.Fatal(err)
	}
	l.mu.Lock()
	second := l.once[once[1]]
	l.mu.Unlock()
	put(once[1], second)
	put(once[2], s.Sealed.Value("another"))
	// A counter that goes back, and one that is incremented by nobody.
	put(l.counter(0), s.Sealed.Value("1 by nobody"))
	put(l.counter(1), s.Sealed.Value("1000000 by nobody"))
	// An acknowledged write without an event.
	l.mu.Lock()
	l.acked[l.base+"once/never"], l.once[l.base+"once/never"] = true, s.Sealed.Value("never")
	l.mu.Unlock()
	l.proceed("the damage")

	s.report.fail = func(...any) {}
	l.patience = 5 * time.Second
	t.Log(l.check(cancel))
	for what, n := range map[string]int{
		"lost": s.report.Lost, "doubled": s.report.Doubled, "wrong": s.report.Wrong, "illegal": s.report.Illegal,
		"events twice": s.report.EventsTwice, "events lost": s.report.EventsLost,
	} {
		if n == 0 {
			t.Errorf("the checks did not find what is %s", what)
		}
		t.Logf("%s: %d", what, n)
	}
}
