package kmstest

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// TestFaultPasses runs the suite on a service behind a Fault that does nothing.
func TestFaultPasses(t *testing.T) {
	Conformance(t, func(*testing.T) kmsclient.Service { return NewFault(NewMemory()).Service() })
}

// TestUnderFaults runs the suite on a service whose calls fail and are made again, with data keys
// and without.
func TestUnderFaults(t *testing.T) {
	ConformanceUnderFaults(t, func(*testing.T) kmsclient.Service { return NewMemory() })
	ConformanceUnderFaults(t, func(*testing.T) kmsclient.Service { return struct{ kmsclient.Service }{NewMemory()} })
}

// TestUnderFaultsFindsMore: a service that takes a call that is made again for one that it has
// answered passes a check, until answers are lost.
func TestUnderFaultsFindsMore(t *testing.T) {
	bad := func() kmsclient.Service {
		b, last := &bent{Memory: NewMemory()}, ""
		b.encrypt = func(ctx context.Context, data []byte) (*service.EncryptResponse, error) {
			if string(data) == last {
				data = []byte("the answer was given")
			}
			last = string(data)
			return b.Memory.Encrypt(ctx, uid, data)
		}
		return b
	}
	for name, s := range map[string]kmsclient.Service{
		"": bad(), "not applied": persistently(everyOther(bad(), false).Service()), "applied": persistently(everyOther(bad(), true).Service()),
	} {
		if err := runCheck(t.Context(), checks[0], s); (err != nil) != (name == "applied") {
			t.Errorf("faults %q: %v", name, err)
		}
	}
}

// TestFaultKeepsInterfaces has GenerateDataKey exactly if the service behind has it.
func TestFaultKeepsInterfaces(t *testing.T) {
	if _, ok := NewFault(NewMemory()).Service().(kmsclient.DataKeyGenerator); !ok {
		t.Error("lost the generator")
	}
	if _, ok := NewFault(struct{ kmsclient.Service }{NewMemory()}).Service().(kmsclient.DataKeyGenerator); ok {
		t.Error("made up a generator")
	}
}

// callAll calls each operation once and returns the errors.
func callAll(ctx context.Context, s kmsclient.Service) map[string]error {
	errs := map[string]error{}
	_, errs[opEncrypt] = s.Encrypt(ctx, uid, []byte(canary))
	_, errs[opDecrypt] = s.Decrypt(ctx, uid, &service.DecryptRequest{})
	_, errs[opStatus] = s.Status(ctx)
	_, errs[opGenerate] = s.(kmsclient.DataKeyGenerator).GenerateDataKey(ctx, uid)
	return errs
}

func TestFailures(t *testing.T) {
	ours := errors.New("ours")
	for name, c := range map[string]struct {
		failure Failure
		applied int
		want    func(error) bool
	}{
		"not applied": {Failure{Err: ours}, 0, func(err error) bool { return errors.Is(err, ours) }},
		"applied":     {Failure{Apply: true, Err: ours}, 1, func(err error) bool { return errors.Is(err, ours) }},
		"default": {Failure{}, 0, func(err error) bool {
			return hasReason(err) && kmsclient.ReasonOf(err) == kmsclient.Unreachable
		}},
	} {
		t.Run(name, func(t *testing.T) {
			f := NewFault(NewMemory())
			f.SetFault(func(string, int) *Failure { return &c.failure })
			for op, err := range callAll(t.Context(), f.Service()) {
				if !c.want(err) || f.Calls(op) != 1 || f.Applied(op) != c.applied {
					t.Errorf("%s: got %v, %d calls of which %d were applied; want %d", op, err, f.Calls(op), f.Applied(op), c.applied)
				}
			}
		})
	}
}

// TestQueue fails as many calls as were queued, of that operation only, before it asks the
// function.
func TestQueue(t *testing.T) {
	f := NewFault(NewMemory())
	first, second, third := errors.New("first"), errors.New("second"), errors.New("third")
	f.Inject(opStatus, Failure{Err: first}, Failure{Err: second, Apply: true})
	f.SetFault(func(op string, call int) *Failure {
		if op == opStatus && call == 3 {
			return &Failure{Err: third}
		}
		return nil
	})
	s := f.Service()
	if _, err := s.Encrypt(t.Context(), uid, []byte(canary)); err != nil {
		t.Errorf("another operation: %v", err)
	}
	for i, want := range []error{first, second, third, nil} {
		if _, err := s.Status(t.Context()); !errors.Is(err, want) {
			t.Errorf("call %d: got %v, want %v", i, err, want)
		}
	}
	if f.Calls(opStatus) != 4 || f.Applied(opStatus) != 2 {
		t.Errorf("%d calls, %d applied; want 4 and 2", f.Calls(opStatus), f.Applied(opStatus))
	}
	f.SetFault(nil)
	if _, err := s.Status(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestHang waits until the context ends, and no longer.
func TestHang(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for _, apply := range []bool{false, true} {
			f := NewFault(NewMemory())
			f.Inject(opStatus, Failure{Hang: true, Apply: apply})
			ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
			start := time.Now()
			_, err := f.Service().Status(ctx)
			if d := time.Since(start); !errors.Is(err, context.DeadlineExceeded) || d != time.Hour {
				t.Errorf("got %v after %v", err, d)
			}
			if applied := f.Applied(opStatus); (applied == 1) != apply {
				t.Errorf("applied %d times", applied)
			}
			cancel()
		}
	})
}

func TestPanics(t *testing.T) {
	f := NewFault(NewMemory())
	f.Inject(opStatus, Failure{Panic: "ours"})
	defer func() {
		if r := recover(); r != "ours" {
			t.Errorf("recovered %v", r)
		}
	}()
	_, _ = f.Service().Status(t.Context())
	t.Error("did not panic")
}

// TestFaultsConcurrently lets each queued failure happen once, however many callers there are.
func TestFaultsConcurrently(t *testing.T) {
	f := NewFault(NewMemory())
	s := f.Service()
	const workers, queued = 16, 10
	f.Inject(opStatus, make([]Failure, queued)...)
	errs := make(chan error, workers)
	var wg sync.WaitGroup
	for range workers {
		wg.Go(func() {
			_, err := s.Status(t.Context())
			errs <- err
		})
	}
	wg.Wait()
	close(errs)
	failed := 0
	for err := range errs {
		if err != nil {
			failed++
		}
	}
	if failed != queued || f.Calls(opStatus) != workers || f.Applied(opStatus) != workers-queued {
		t.Errorf("%d failures, %d calls, %d applied; want %d, %d, %d", failed, f.Calls(opStatus), f.Applied(opStatus), queued, workers, workers-queued)
	}
}
