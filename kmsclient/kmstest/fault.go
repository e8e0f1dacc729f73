package kmstest

import (
	"context"
	"sync"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// Failure is what becomes of one call instead of its answer. The zero value fails the call, which
// is not applied, with an error of [kmsclient.ClassUnavailable].
type Failure struct {
	Apply bool  // call the service and discard its response: applied, but reported as failed
	Hang  bool  // wait until the context ends; the error is then the context's
	Panic any   // panic with this, unless nil
	Err   error // what the call returns; by default an error of ClassUnavailable
}

// Fault wraps a service, counts the calls to it and makes some of them fail. It is safe for
// concurrent use.
//
// It is no service itself: [Fault.Service] is one that has GenerateDataKey exactly if the service
// behind has it, which is what callers find out by a type assertion.
type Fault struct {
	inner kmsclient.Service

	mu      sync.Mutex
	calls   map[string]int
	applied map[string]int
	queue   map[string][]Failure
	decide  func(op string, call int) *Failure
}

// NewFault puts a fault before a service. Nothing fails until [Fault.Inject] or [Fault.SetFault]
// say so.
func NewFault(inner kmsclient.Service) *Fault {
	return &Fault{inner: inner, calls: map[string]int{}, applied: map[string]int{}, queue: map[string][]Failure{}}
}

// Inject makes the next calls of the operation ("Encrypt", "Decrypt", "Status" or
// "GenerateDataKey") fail, one for each failure.
func (f *Fault) Inject(op string, failures ...Failure) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.queue[op] = append(f.queue[op], failures...)
}

// SetFault has decide choose what becomes of each call that no injected failure is queued for: nil
// lets it pass. call counts the operation's calls from 1. decide runs on the caller's goroutine and
// may block it. A nil decide lets all pass.
func (f *Fault) SetFault(decide func(op string, call int) *Failure) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.decide = decide
}

// Calls returns how often the operation was called, whatever became of it.
func (f *Fault) Calls(op string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.calls[op]
}

// Applied returns how often the operation reached the wrapped service, even if a failure then hid
// the answer.
func (f *Fault) Applied(op string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.applied[op]
}

// Service returns the service to hand to what is tested. It implements [kmsclient.DataKeyGenerator]
// if the wrapped service does.
func (f *Fault) Service() kmsclient.Service {
	if g, ok := f.inner.(kmsclient.DataKeyGenerator); ok {
		return faultyGenerator{faulty{f}, g}
	}
	return faulty{f}
}

// next counts a call and returns its failure, or nil.
func (f *Fault) next(op string) *Failure {
	f.mu.Lock()
	f.calls[op]++
	call, decide := f.calls[op], f.decide
	if q := f.queue[op]; len(q) > 0 {
		f.queue[op] = q[1:]
		f.mu.Unlock()
		return &q[0]
	}
	f.mu.Unlock()
	if decide == nil {
		return nil
	}
	return decide(op, call)
}

func (f *Fault) apply(op string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.applied[op]++
}

// through passes a call on, or does to it what the next failure says.
func through[T any](ctx context.Context, f *Fault, op string, call func() (T, error)) (T, error) {
	failure := f.next(op)
	if failure == nil || failure.Apply {
		f.apply(op)
		res, err := call()
		if failure == nil {
			return res, err
		}
	}
	var zero T
	if failure.Hang {
		<-ctx.Done()
		return zero, ctx.Err()
	}
	if failure.Panic != nil {
		panic(failure.Panic)
	}
	if failure.Err == nil {
		return zero, &kmsclient.Error{Op: op, Reason: kmsclient.Unreachable, Detail: "a fault of the test"}
	}
	return zero, failure.Err
}

type faulty struct{ f *Fault }

type faultyGenerator struct {
	faulty
	generator kmsclient.DataKeyGenerator
}

var (
	_ kmsclient.Service          = faulty{}
	_ kmsclient.DataKeyGenerator = faultyGenerator{}
)

// Encrypt implements [kmsclient.Service].
func (s faulty) Encrypt(ctx context.Context, uid string, data []byte) (*service.EncryptResponse, error) {
	return through(ctx, s.f, opEncrypt, func() (*service.EncryptResponse, error) { return s.f.inner.Encrypt(ctx, uid, data) })
}

// Decrypt implements [kmsclient.Service].
func (s faulty) Decrypt(ctx context.Context, uid string, req *service.DecryptRequest) ([]byte, error) {
	return through(ctx, s.f, opDecrypt, func() ([]byte, error) { return s.f.inner.Decrypt(ctx, uid, req) })
}

// Status implements [kmsclient.Service].
func (s faulty) Status(ctx context.Context) (*service.StatusResponse, error) {
	return through(ctx, s.f, opStatus, func() (*service.StatusResponse, error) { return s.f.inner.Status(ctx) })
}

// GenerateDataKey implements [kmsclient.DataKeyGenerator].
func (s faultyGenerator) GenerateDataKey(ctx context.Context, uid string) (*kmsclient.DataKey, error) {
	return through(ctx, s.f, opGenerate, func() (*kmsclient.DataKey, error) { return s.generator.GenerateDataKey(ctx, uid) })
}
