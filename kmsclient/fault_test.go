package kmsclient_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"go.uber.org/goleak"
	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/kmstest"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const canary = "Canary-secret-of-thirty-2-bytes!"

var operationNames = []string{"Encrypt", "Decrypt", "Status", "GenerateDataKey"}

// withoutGenerator hides that a service makes data keys.
type withoutGenerator struct{ kmsclient.Service }

// TestConformance runs the suite of all backends on the wrapper.
func TestConformance(t *testing.T) {
	for name, s := range map[string]func() kmsclient.Service{
		"generator":    func() kmsclient.Service { return kmstest.NewMemory() },
		"no generator": func() kmsclient.Service { return withoutGenerator{kmstest.NewMemory()} },
	} {
		t.Run(name, func(t *testing.T) {
			// More than half a KiB may not be storable once it is wrapped.
			kmstest.Conformance(t, func(t *testing.T) kmsclient.Service { return newClient(t, s(), nil) }, kmstest.MaxPlaintext(512))
		})
	}
}

// call makes one call of the operation and returns an error if it fails or its result is wrong. m
// is the KMS at the end of it.
func call(ctx context.Context, c *kmsclient.Client, m *kmstest.Memory, op string) error {
	res, err := m.Encrypt(context.WithoutCancel(ctx), "uid", []byte(canary))
	if err != nil {
		return err
	}
	got, want := []byte(canary), canary
	switch op {
	case "Encrypt":
		if res, err = c.Encrypt(ctx, "uid", []byte(canary)); err == nil {
			got, err = m.Decrypt(ctx, "uid", &service.DecryptRequest{Ciphertext: res.Ciphertext, KeyID: res.KeyID, Annotations: res.Annotations})
		}
	case "Decrypt":
		got, err = c.Decrypt(ctx, "uid", &service.DecryptRequest{Ciphertext: res.Ciphertext, KeyID: res.KeyID, Annotations: res.Annotations})
	case "Status":
		var s *service.StatusResponse
		if s, err = c.Status(ctx); err == nil {
			got, want = []byte(s.KeyID), res.KeyID
		}
	case "GenerateDataKey":
		var k *kmsclient.DataKey
		if k, err = c.GenerateDataKey(ctx, "uid"); err == nil {
			want = string(k.Plaintext)
			got, err = m.Decrypt(ctx, "uid", &service.DecryptRequest{Ciphertext: k.Ciphertext, KeyID: k.KeyID, Annotations: k.Annotations})
		}
	}
	if err == nil && string(got) != want {
		err = errors.New("a wrong result")
	}
	return err
}

// newFaulty returns a wrapper, a fault behind it and an honest KMS behind that.
func newFaulty(t *testing.T) (*kmsclient.Client, *kmstest.Fault, *kmstest.Memory) {
	t.Helper()
	m := kmstest.NewMemory()
	f := kmstest.NewFault(m)
	return newClient(t, f.Service(), nil), f, m
}

// TestFaultsAreRetried succeeds after two attempts that failed, whether or not the KMS had carried
// them out.
func TestFaultsAreRetried(t *testing.T) {
	for _, op := range operationNames {
		for name, tc := range map[string]struct {
			failure kmstest.Failure
			applied int
		}{
			"not applied":          {kmstest.Failure{}, 1},
			"applied":              {kmstest.Failure{Apply: true}, 3},
			"not applied, foreign": {kmstest.Failure{Err: errors.New(canary)}, 1},
			"applied, foreign":     {kmstest.Failure{Apply: true, Err: errors.New(canary)}, 3},
			"not applied, hangs":   {kmstest.Failure{Hang: true}, 1},
			"applied, hangs":       {kmstest.Failure{Apply: true, Hang: true}, 3},
		} {
			t.Run(op+"/"+name, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					c, f, m := newFaulty(t)
					f.Inject(op, tc.failure, tc.failure)
					if err := call(t.Context(), c, m, op); err != nil {
						t.Error(err)
					}
					if f.Calls(op) != 3 || f.Applied(op) != tc.applied {
						t.Errorf("%d calls, %d applied; want 3 and %d", f.Calls(op), f.Applied(op), tc.applied)
					}
				})
			})
		}
	}
}

// TestFaultsThatLast end in an error of a class, after as many attempts as make sense for it.
func TestFaultsThatLast(t *testing.T) {
	for name, tc := range map[string]struct {
		failure kmstest.Failure
		want    kmsclient.Class
		calls   int
	}{
		"unavailable": {kmstest.Failure{}, kmsclient.ClassUnavailable, 3},
		"applied":     {kmstest.Failure{Apply: true}, kmsclient.ClassUnavailable, 3},
		"answered":    {kmstest.Failure{Err: &kmsclient.Error{Reason: kmsclient.Failing}}, kmsclient.ClassUnavailable, 2},
		"foreign":     {kmstest.Failure{Err: fmt.Errorf("cannot wrap %s", canary)}, kmsclient.ClassUnavailable, 3},
		"hangs":       {kmstest.Failure{Hang: true}, kmsclient.ClassUnavailable, 3},
		"denied":      {kmstest.Failure{Err: &kmsclient.Error{Reason: kmsclient.Denied}}, kmsclient.ClassDenied, 1},
		"key":         {kmstest.Failure{Err: &kmsclient.Error{Reason: kmsclient.KeyDisabled}}, kmsclient.ClassKeyUnusable, 1},
		"invalid":     {kmstest.Failure{Err: &kmsclient.Error{Reason: kmsclient.Invalid}}, kmsclient.ClassInvalid, 1},
		"panics":      {kmstest.Failure{Panic: canary}, kmsclient.ClassContract, 1},
	} {
		for _, op := range operationNames {
			t.Run(name+"/"+op, func(t *testing.T) {
				synctest.Test(t, func(t *testing.T) {
					c, f, m := newFaulty(t)
					f.SetFault(func(string, int) *kmstest.Failure { return &tc.failure })
					err := call(t.Context(), c, m, op)
					if class(t, err) != tc.want || f.Calls(op) != tc.calls || strings.Contains(fmt.Sprintf("%v %+v", err, err), "anary") {
						t.Errorf("got %v after %d calls; want class %v after %d", err, f.Calls(op), tc.want, tc.calls)
					}
					f.SetFault(nil)
					if err := call(t.Context(), c, m, op); err != nil {
						t.Errorf("the next call: %v", err)
					}
				})
			})
		}
	}
}

// TestWithoutGenerator wraps a key made here, and a second one if the first was wrapped but the
// answer was lost.
func TestWithoutGenerator(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		m := kmstest.NewMemory()
		f := kmstest.NewFault(withoutGenerator{m})
		c := newClient(t, f.Service(), nil)
		f.Inject("Encrypt", kmstest.Failure{Apply: true}, kmstest.Failure{})
		if err := call(t.Context(), c, m, "GenerateDataKey"); err != nil {
			t.Error(err)
		}
		if f.Calls("Encrypt") != 3 || f.Applied("Encrypt") != 2 {
			t.Errorf("%d calls, %d applied; want 3 and 2", f.Calls("Encrypt"), f.Applied("Encrypt"))
		}
	})
}

// TestEndBetweenAttempts ends the context while the wrapper waits for its next attempt. The error
// says what the attempt met, and that a context ended it, whatever the canceller gave for a reason.
func TestEndBetweenAttempts(t *testing.T) {
	for name, reason := range map[string]error{"plain": nil, "with a cause": errors.New(canary)} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				f := kmstest.NewFault(kmstest.NewMemory())
				f.SetFault(func(string, int) *kmstest.Failure { return &kmstest.Failure{} })
				c, err := kmsclient.New(kmsclient.Config{Name: "test", Backend: f.Service(), MinBackoff: time.Hour})
				if err != nil {
					t.Fatal(err)
				}
				ctx, cancel := context.WithCancelCause(t.Context())
				ended := make(chan error, 1)
				go func() {
					_, err := c.Status(ctx)
					ended <- err
				}()
				synctest.Wait() // it waits for its second attempt
				cancel(reason)
				err = <-ended
				if class(t, err) != kmsclient.ClassUnavailable || !errors.Is(err, context.Canceled) || strings.Contains(err.Error(), canary) {
					t.Errorf("got %v", err)
				}
				if n := f.Calls("Status"); n != 1 {
					t.Errorf("%d calls", n)
				}
			})
		})
	}
}

// generator makes what the test sets.
type generator struct {
	kmsclient.Service
	key *kmsclient.DataKey
}

func (g generator) GenerateDataKey(context.Context, string) (*kmsclient.DataKey, error) {
	return g.key, nil
}

// TestDataKeyContract turns away every data key that could not be used or stored, at once.
func TestDataKeyContract(t *testing.T) {
	seed, long := []byte(canary), strings.Repeat("x", 1025)
	for name, key := range map[string]*kmsclient.DataKey{
		"nothing":             nil,
		"empty":               {},
		"no plaintext":        {Ciphertext: []byte("c"), KeyID: "k"},
		"short":               {Plaintext: seed[:31], Ciphertext: []byte("c"), KeyID: "k"},
		"long":                {Plaintext: append([]byte("x"), seed...), Ciphertext: []byte("c"), KeyID: "k"},
		"no ciphertext":       {Plaintext: seed, KeyID: "k"},
		"long ciphertext":     {Plaintext: seed, Ciphertext: []byte(long), KeyID: "k"},
		"no key ID":           {Plaintext: seed, Ciphertext: []byte("c")},
		"over-long key ID":    {Plaintext: seed, Ciphertext: []byte("c"), KeyID: long},
		"key ID not UTF-8":    {Plaintext: seed, Ciphertext: []byte("c"), KeyID: "\xff"},
		"annotation not FQDN": {Plaintext: seed, Ciphertext: []byte("c"), KeyID: "k", Annotations: map[string][]byte{"plain": nil}},
	} {
		f := kmstest.NewFault(generator{kmstest.NewMemory(), key})
		key, err := newClient(t, f.Service(), nil).GenerateDataKey(t.Context(), "uid")
		if class(t, err) != kmsclient.ClassContract || key != nil || strings.Contains(err.Error(), "anary") {
			t.Errorf("%s: %v, %v", name, key, err)
		}
		if n := f.Calls("GenerateDataKey"); n != 1 {
			t.Errorf("%s: %d calls; a broken contract is not tried again", name, n)
		}
	}
	exact := strings.Repeat("x", 1024)
	ok := &kmsclient.DataKey{Plaintext: seed, Ciphertext: []byte(exact), KeyID: exact, Annotations: map[string][]byte{"a.b": make([]byte, 32<<10-3)}}
	if _, err := newClient(t, generator{kmstest.NewMemory(), ok}, nil).GenerateDataKey(t.Context(), "uid"); err != nil {
		t.Errorf("every limit met exactly: %v", err)
	}
}

// scribbler is a KMS that overwrites what it has wrapped.
type scribbler struct{ kmsclient.Service }

func (s scribbler) Encrypt(ctx context.Context, uid string, data []byte) (*service.EncryptResponse, error) {
	defer clear(data)
	return s.Service.Encrypt(ctx, uid, data)
}

// TestNewKeyIsWhatWasWrapped: what a backend does with its argument does not change the key.
func TestNewKeyIsWhatWasWrapped(t *testing.T) {
	c := newClient(t, scribbler{kmstest.NewMemory()}, nil)
	key, err := c.GenerateDataKey(t.Context(), "uid")
	if err != nil {
		t.Fatal(err)
	}
	plaintext, err := c.Decrypt(t.Context(), "uid", &service.DecryptRequest{Ciphertext: key.Ciphertext, KeyID: key.KeyID, Annotations: key.Annotations})
	if err != nil || !bytes.Equal(plaintext, key.Plaintext) {
		t.Errorf("the key is not what the KMS unwraps: %v", err)
	}
}
