package kmstest

import (
	"context"
	"errors"
	"testing"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// errLost is the failure of every other call under [ConformanceUnderFaults].
var errLost = errors.New("a fault of the test: the call failed, or its answer was lost")

// ConformanceUnderFaults runs [Conformance] while every other call fails, in both forms: not
// carried out, and carried out with its answer lost. A failed call is made again, as callers of a
// KMS do; what it then answers, and what was answered before, must be as good as without the fault.
func ConformanceUnderFaults(t *testing.T, newService func(t *testing.T) kmsclient.Service, opts ...Option) {
	t.Helper()
	for name, apply := range map[string]bool{"not applied": false, "applied": true} {
		t.Run(name, func(t *testing.T) {
			Conformance(t, func(t *testing.T) kmsclient.Service {
				f := everyOther(newService(t), apply)
				t.Cleanup(func() {
					for _, op := range []string{opEncrypt, opDecrypt, opStatus, opGenerate} {
						want := f.Calls(op) / 2
						if apply {
							want = f.Calls(op)
						}
						if f.Applied(op) != want {
							t.Errorf("%s: %d of %d calls were carried out, want %d", op, f.Applied(op), f.Calls(op), want)
						}
					}
				})
				return persistently(f.Service())
			}, opts...)
		})
	}
}

// everyOther makes the first call of each operation fail, the third, and so on.
func everyOther(s kmsclient.Service, apply bool) *Fault {
	f := NewFault(s)
	f.SetFault(func(_ string, call int) *Failure {
		if call%2 == 1 {
			return &Failure{Apply: apply, Err: errLost}
		}
		return nil
	})
	return f
}

// persistently returns s with each call made until it does not fail with errLost. It makes data
// keys exactly if s does.
func persistently(s kmsclient.Service) kmsclient.Service {
	if g, ok := s.(kmsclient.DataKeyGenerator); ok {
		return persistentGenerator{persistent{s}, g}
	}
	return persistent{s}
}

type persistent struct{ behind kmsclient.Service }

type persistentGenerator struct {
	persistent
	generator kmsclient.DataKeyGenerator
}

var (
	_ kmsclient.Service          = persistent{}
	_ kmsclient.DataKeyGenerator = persistentGenerator{}
)

func again[T any](call func() (T, error)) (T, error) {
	for {
		if res, err := call(); !errors.Is(err, errLost) {
			return res, err
		}
	}
}

// Encrypt implements [kmsclient.Service].
func (p persistent) Encrypt(ctx context.Context, uid string, data []byte) (*service.EncryptResponse, error) {
	return again(func() (*service.EncryptResponse, error) { return p.behind.Encrypt(ctx, uid, data) })
}

// Decrypt implements [kmsclient.Service].
func (p persistent) Decrypt(ctx context.Context, uid string, req *service.DecryptRequest) ([]byte, error) {
	return again(func() ([]byte, error) { return p.behind.Decrypt(ctx, uid, req) })
}

// Status implements [kmsclient.Service].
func (p persistent) Status(ctx context.Context) (*service.StatusResponse, error) {
	return again(func() (*service.StatusResponse, error) { return p.behind.Status(ctx) })
}

// GenerateDataKey implements [kmsclient.DataKeyGenerator].
func (p persistentGenerator) GenerateDataKey(ctx context.Context, uid string) (*kmsclient.DataKey, error) {
	return again(func() (*kmsclient.DataKey, error) { return p.generator.GenerateDataKey(ctx, uid) })
}
