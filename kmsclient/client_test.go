package kmsclient_test

import (
	"bytes"
	"context"
	"errors"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// backend answers what the test sets.
type backend struct {
	calls   atomic.Int64
	encrypt func(ctx context.Context) (*service.EncryptResponse, error)
	decrypt func() ([]byte, error)
	status  func() (*service.StatusResponse, error)
}

func (b *backend) Encrypt(ctx context.Context, _ string, _ []byte) (*service.EncryptResponse, error) {
	b.calls.Add(1)
	return b.encrypt(ctx)
}

func (b *backend) Decrypt(context.Context, string, *service.DecryptRequest) ([]byte, error) {
	b.calls.Add(1)
	return b.decrypt()
}

func (b *backend) Status(context.Context) (*service.StatusResponse, error) {
	b.calls.Add(1)
	return b.status()
}

func newClient(t *testing.T, b kmsclient.Service, observe func(kmsclient.Call)) *kmsclient.Client {
	t.Helper()
	c, err := kmsclient.New(kmsclient.Config{Name: "test", Backend: b, Observer: observe})
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func class(t *testing.T, err error) kmsclient.Class {
	t.Helper()
	var e *kmsclient.Error
	if !errors.As(err, &e) {
		t.Fatalf("%v is not a *kmsclient.Error", err)
	}
	if e.Provider != "test" || e.Op == "" {
		t.Errorf("error names provider %q and operation %q", e.Provider, e.Op)
	}
	return e.Class()
}

var good = &service.EncryptResponse{Ciphertext: []byte("wrapped"), KeyID: "k1"}

// TestContract turns away every answer that could not be stored or used.
func TestContract(t *testing.T) {
	long := strings.Repeat("x", 1025)
	for name, res := range map[string]*service.EncryptResponse{
		"nothing":             nil,
		"no ciphertext":       {KeyID: "k"},
		"long ciphertext":     {KeyID: "k", Ciphertext: []byte(long)},
		"no key ID":           {Ciphertext: []byte("c")},
		"over-long key ID":    {Ciphertext: []byte("c"), KeyID: long},
		"key ID not UTF-8":    {Ciphertext: []byte("c"), KeyID: "\xff"},
		"annotation not FQDN": {Ciphertext: []byte("c"), KeyID: "k", Annotations: map[string][]byte{"plain": nil}},
		"large annotations":   {Ciphertext: []byte("c"), KeyID: "k", Annotations: map[string][]byte{"a.b": make([]byte, 33<<10)}},
	} {
		b := &backend{encrypt: func(context.Context) (*service.EncryptResponse, error) { return res, nil }}
		if _, err := newClient(t, b, nil).GenerateDataKey(t.Context(), "u"); class(t, err) != kmsclient.ClassContract {
			t.Errorf("%s: %v", name, err)
		}
		if n := b.calls.Load(); n != 1 {
			t.Errorf("%s: %d calls; a broken contract is not tried again", name, n)
		}
	}
	for name, res := range map[string]*service.StatusResponse{
		"nothing": nil, "version": {Version: "v1", Healthz: "ok", KeyID: "k"}, "key ID": {Version: "v2", Healthz: "ok"},
	} {
		b := &backend{status: func() (*service.StatusResponse, error) { return res, nil }}
		if _, err := newClient(t, b, nil).Status(t.Context()); class(t, err) != kmsclient.ClassContract {
			t.Errorf("status, %s: %v", name, err)
		}
	}
	for _, data := range [][]byte{nil, make([]byte, 6<<10+1)} {
		b := &backend{decrypt: func() ([]byte, error) { return data, nil }}
		_, err := newClient(t, b, nil).Decrypt(t.Context(), "u", &service.DecryptRequest{Ciphertext: []byte("c"), KeyID: "k"})
		if class(t, err) != kmsclient.ClassContract {
			t.Errorf("plaintext of %d bytes: %v", len(data), err)
		}
	}
}

// TestRequestLimits refuses what no KMS could have been given, without a call.
func TestRequestLimits(t *testing.T) {
	b := &backend{}
	c := newClient(t, b, nil)
	_, empty := c.Encrypt(t.Context(), "u", nil)
	_, long := c.Encrypt(t.Context(), "u", make([]byte, 6<<10+1))
	_, foreign := c.Decrypt(t.Context(), "u", &service.DecryptRequest{KeyID: strings.Repeat("x", 2000), Ciphertext: []byte("c")})
	for _, err := range []error{empty, long, foreign} {
		if class(t, err) != kmsclient.ClassInvalid {
			t.Error(err)
		}
	}
	if b.calls.Load() != 0 {
		t.Error("the backend was called")
	}
}

// TestRetries tries again only what may pass, and hides what a backend says in its own words.
func TestRetries(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const canary = "Canary-in-a-foreign-error"
		b := &backend{}
		b.encrypt = func(context.Context) (*service.EncryptResponse, error) {
			if b.calls.Load() < 3 {
				return nil, errors.New(canary)
			}
			return good, nil
		}
		var seen []string
		key, err := newClient(t, b, func(c kmsclient.Call) { seen = append(seen, c.Class+" "+c.KeyID) }).GenerateDataKey(t.Context(), "u")
		if err != nil || key.KeyID != "k1" || len(key.Plaintext) != 32 {
			t.Fatalf("got %v, %v", key, err)
		}
		if got := strings.Join(seen, ","); got != "unavailable ,unavailable ,ok k1" {
			t.Errorf("observed %q", got)
		}

		for _, reason := range []kmsclient.Reason{kmsclient.Denied, kmsclient.KeyDisabled, kmsclient.Invalid} {
			b := &backend{decrypt: func() ([]byte, error) { return nil, &kmsclient.Error{Reason: reason, RequestID: "r"} }}
			_, err := newClient(t, b, nil).Decrypt(t.Context(), "u", &service.DecryptRequest{Ciphertext: []byte("c"), KeyID: "k"})
			if class(t, err) != reason.Class() || b.calls.Load() != 1 {
				t.Errorf("%v: got %v after %d calls", reason, err, b.calls.Load())
			}
		}

		b = &backend{status: func() (*service.StatusResponse, error) { return nil, errors.New(canary) }}
		_, err = newClient(t, b, nil).Status(t.Context())
		if class(t, err) != kmsclient.ClassUnavailable || b.calls.Load() != 3 || strings.Contains(err.Error(), canary) {
			t.Errorf("got %v after %d calls", err, b.calls.Load())
		}
	})
}

// TestPanic keeps a backend's panic, and what it panics with, inside.
func TestPanic(t *testing.T) {
	b := &backend{status: func() (*service.StatusResponse, error) { panic("Canary") }}
	_, err := newClient(t, b, nil).Status(t.Context())
	if class(t, err) != kmsclient.ClassContract || strings.Contains(err.Error(), "Canary") {
		t.Error(err)
	}
}

// TestTimeout ends an attempt that hangs, and a caller's own deadline ends the whole.
func TestTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &backend{encrypt: func(ctx context.Context) (*service.EncryptResponse, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}}
		c := newClient(t, b, nil)
		start := time.Now()
		if _, err := c.Encrypt(t.Context(), "u", []byte("x")); class(t, err) != kmsclient.ClassUnavailable {
			t.Error(err)
		}
		if d := time.Since(start); b.calls.Load() != 3 || d < 9*time.Second || d > 12*time.Second {
			t.Errorf("%d attempts in %v", b.calls.Load(), d)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := c.Encrypt(ctx, "u", []byte("x")); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("got %v, want the caller's deadline", err)
		}
	})
}

// TestCircuit fails at once while the KMS is silent, probes it, and closes when it answers.
func TestCircuit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		down := true
		b := &backend{encrypt: func(context.Context) (*service.EncryptResponse, error) {
			if down {
				return nil, &kmsclient.Error{Reason: kmsclient.Unreachable, Code: "Throttling", HTTPStatus: 503, Detail: "too many calls"}
			}
			return good, nil
		}}
		c := newClient(t, b, nil)
		for range 2 {
			if _, err := c.Encrypt(t.Context(), "u", []byte("x")); err == nil {
				t.Fatal("a silent KMS succeeded")
			}
		}
		before, start := b.calls.Load(), time.Now()
		_, err := c.Encrypt(t.Context(), "u", []byte("x"))
		if class(t, err) != kmsclient.ClassUnavailable || b.calls.Load() != before || time.Since(start) != 0 {
			t.Errorf("open circuit: %v, %d calls, %v", err, b.calls.Load()-before, time.Since(start))
		}
		for _, want := range []string{`"Throttling"`, "HTTP 503", "not called", "too many calls"} {
			if !strings.Contains(err.Error(), want) {
				t.Errorf("open circuit: %q does not say %s", err, want)
			}
		}
		down = false
		time.Sleep(6 * time.Second) // in the bubble's clock
		if res, err := c.Encrypt(t.Context(), "u", []byte("x")); err != nil || !bytes.Equal(res.Ciphertext, good.Ciphertext) {
			t.Errorf("after the KMS came back: %v", err)
		}
	})
}
