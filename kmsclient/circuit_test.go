package kmsclient_test

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

// newOpen returns a wrapper whose circuit five failed attempts have just opened, what is behind it,
// and when that was. It must run in a bubble.
func newOpen(t *testing.T) (c *kmsclient.Client, f *kmstest.Fault, opened time.Time) {
	t.Helper()
	c, f, _ = newFaulty(t)
	f.SetFault(func(string, int) *kmstest.Failure {
		opened = time.Now()
		return &kmstest.Failure{}
	})
	for range 2 { // three attempts, then two and a third that is not made
		if _, err := c.Status(t.Context()); class(t, err) != kmsclient.ClassUnavailable {
			t.Fatal(err)
		}
	}
	if n := f.Calls("Status"); n != 5 {
		t.Fatalf("%d calls before the circuit opened; want 5", n)
	}
	f.SetFault(nil)
	return c, f, opened
}

// refused fails the test unless a call fails at once and without the backend.
func refused(t *testing.T, c *kmsclient.Client, f *kmstest.Fault, when string) {
	t.Helper()
	calls, start := f.Calls("Status"), time.Now()
	_, err := c.Status(t.Context())
	if class(t, err) != kmsclient.ClassUnavailable || f.Calls("Status") != calls || time.Since(start) != 0 {
		t.Errorf("%s: %v, %d calls, %v; want an error at once", when, err, f.Calls("Status")-calls, time.Since(start))
	}
}

const probeAfter = 5*time.Second + time.Millisecond // in the bubble's clock

// TestProbe lets exactly one call through once the circuit has been open for a while.
func TestProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, f, opened := newOpen(t)
		refused(t, c, f, "open")
		time.Sleep(time.Until(opened.Add(probeAfter - 2*time.Millisecond)))
		refused(t, c, f, "just before the probe")

		time.Sleep(2 * time.Millisecond)
		f.Inject("Status", kmstest.Failure{Hang: true})
		ended := make(chan error, 1)
		go func() {
			_, err := c.Status(t.Context())
			ended <- err
		}()
		synctest.Wait()
		if n := f.Calls("Status"); n != 6 {
			t.Fatalf("%d calls; want a sixth as the probe", n)
		}
		refused(t, c, f, "while the probe is under way")
		if err := <-ended; class(t, err) != kmsclient.ClassUnavailable || f.Calls("Status") != 6 {
			t.Errorf("probe without an answer: %v, %d calls", err, f.Calls("Status"))
		}
		refused(t, c, f, "after the probe failed")

		time.Sleep(probeAfter)
		if _, err := c.Status(t.Context()); err != nil {
			t.Errorf("probe: %v", err)
		}
		var wg sync.WaitGroup
		for range 8 {
			wg.Go(func() {
				if _, err := c.Status(t.Context()); err != nil {
					t.Errorf("closed: %v", err)
				}
			})
		}
		wg.Wait()
	})
}

// TestTwoCircuits: that Status is not answered keeps nobody from using the key, nor the other way
// round.
func TestTwoCircuits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, silent := range operationNames {
			c, f, m := newFaulty(t)
			f.SetFault(func(op string, _ int) *kmstest.Failure {
				if (op == "Status") == (silent == "Status") {
					return &kmstest.Failure{}
				}
				return nil
			})
			for range 2 {
				if err := call(t.Context(), c, m, silent); class(t, err) != kmsclient.ClassUnavailable {
					t.Fatalf("%s: %v", silent, err)
				}
			}
			for _, op := range operationNames {
				before := f.Calls(op)
				err := call(t.Context(), c, m, op)
				if open := (op == "Status") == (silent == "Status"); open != (err != nil) || open != (f.Calls(op) == before) {
					t.Errorf("%s is silent: %s: %v, %d calls", silent, op, err, f.Calls(op)-before)
				}
			}
		}
	})
}

// TestProbesThatSayNothing do not keep the circuit from being probed again; an answer of any kind
// closes it.
func TestProbesThatSayNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, f, _ := newOpen(t)
		time.Sleep(probeAfter)
		for range 3 {
			ctx, cancel := context.WithCancel(t.Context())
			f.Inject("Status", kmstest.Failure{Hang: true})
			ended := make(chan error, 1)
			go func() {
				_, err := c.Status(ctx)
				ended <- err
			}()
			synctest.Wait()
			cancel()
			if err := <-ended; !errors.Is(err, context.Canceled) {
				t.Errorf("a probe whose caller gave up: %v", err)
			}
		}
		if n := f.Calls("Status"); n != 8 {
			t.Errorf("%d calls; want each of the three to be a probe", n)
		}
		f.Inject("Status", kmstest.Failure{Err: &kmsclient.Error{Reason: kmsclient.Denied}})
		if _, err := c.Status(t.Context()); class(t, err) != kmsclient.ClassDenied {
			t.Errorf("a probe that is refused: %v", err)
		}
		if _, err := c.Status(t.Context()); err != nil {
			t.Errorf("the KMS is there, but: %v", err)
		}
	})
}

// TestProbeThatPanics ends, as far as the circuit is concerned.
func TestProbeThatPanics(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, f, _ := newOpen(t)
		time.Sleep(probeAfter)
		f.Inject("Status", kmstest.Failure{Panic: canary})
		if _, err := c.Status(t.Context()); class(t, err) != kmsclient.ClassContract {
			t.Error(err)
		}
		if _, err := c.Status(t.Context()); err != nil {
			t.Error(err)
		}
	})
}

// TestCircuitStaysClosed counts only failures in a row, and only those that say that the KMS is
// silent.
func TestCircuitStaysClosed(t *testing.T) {
	for name, failure := range map[string]kmstest.Failure{
		"denied":  {Err: &kmsclient.Error{Reason: kmsclient.Denied}},
		"invalid": {Err: &kmsclient.Error{Reason: kmsclient.Invalid}},
		"panic":   {Panic: canary},
	} {
		t.Run(name, func(t *testing.T) {
			c, f, _ := newFaulty(t)
			for range 20 {
				f.Inject("Status", failure)
				_, _ = c.Status(t.Context())
			}
			if _, err := c.Status(t.Context()); err != nil || f.Calls("Status") != 21 {
				t.Errorf("%v, %d calls", err, f.Calls("Status"))
			}
		})
	}
	t.Run("answered", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c, f, _ := newFaulty(t)
			f.SetFault(func(string, int) *kmstest.Failure {
				return &kmstest.Failure{Err: &kmsclient.Error{Reason: kmsclient.Failing}}
			})
			for range 20 {
				if _, err := c.Status(t.Context()); class(t, err) != kmsclient.ClassUnavailable {
					t.Error(err)
				}
			}
			f.SetFault(nil)
			if _, err := c.Status(t.Context()); err != nil || f.Calls("Status") != 41 {
				t.Errorf("%v, %d calls; want two of each", err, f.Calls("Status"))
			}
		})
	})
	t.Run("between successes", func(t *testing.T) {
		synctest.Test(t, func(t *testing.T) {
			c, f, _ := newFaulty(t)
			for range 10 {
				f.Inject("Status", kmstest.Failure{}, kmstest.Failure{})
				if _, err := c.Status(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
		})
	})
	t.Run("callers that gave up", func(t *testing.T) {
		c, f, _ := newFaulty(t)
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		for range 20 {
			_, _ = c.Status(ctx)
		}
		if _, err := c.Status(t.Context()); err != nil || f.Calls("Status") != 21 {
			t.Errorf("%v, %d calls", err, f.Calls("Status"))
		}
	})
}
