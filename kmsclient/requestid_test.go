package kmsclient_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// TestRequestID follows the ids of answered and of failed requests to the observer, an attempt at a
// time.
func TestRequestID(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		for name, tt := range map[string]struct {
			attempts []func(context.Context) (*service.EncryptResponse, error)
			want     []string // request ID and class of each attempt
		}{
			"noted": {want: []string{"r1 ok"}, attempts: []func(context.Context) (*service.EncryptResponse, error){noted(good, nil, "r1")}},
			"last":  {want: []string{"r2 ok"}, attempts: []func(context.Context) (*service.EncryptResponse, error){noted(good, nil, "r1", "r2")}},
			"none":  {want: []string{" ok"}, attempts: []func(context.Context) (*service.EncryptResponse, error){noted(good, nil)}},
			"not ids": {want: []string{" ok"}, attempts: []func(context.Context) (*service.EncryptResponse, error){
				noted(good, nil, "", "a b", "a\n", "ü", "\x00", strings.Repeat("x", 129)),
			}},
			"longest": {want: []string{strings.Repeat("x", 128) + " ok"}, attempts: []func(context.Context) (*service.EncryptResponse, error){
				noted(good, nil, strings.Repeat("x", 128)),
			}},
			"error's own": {want: []string{"e denied"}, attempts: []func(context.Context) (*service.EncryptResponse, error){
				noted(nil, &kmsclient.Error{Reason: kmsclient.Denied, RequestID: "e"}, "r1"),
			}},
			"broken answer": {want: []string{"r1 contract"}, attempts: []func(context.Context) (*service.EncryptResponse, error){
				noted(&service.EncryptResponse{}, nil, "r1"),
			}},
			"not from the attempt before": {want: []string{"r1 unavailable", " unavailable", "r3 ok"}, attempts: []func(context.Context) (*service.EncryptResponse, error){
				noted(nil, errors.New("x"), "r1"), noted(nil, errors.New("x")), noted(good, nil, "r3"),
			}},
		} {
			b := &backend{}
			b.encrypt = func(ctx context.Context) (*service.EncryptResponse, error) { return tt.attempts[b.calls.Load()-1](ctx) }
			var got []string
			c := newClient(t, b, func(c kmsclient.Call) { got = append(got, c.RequestID+" "+c.Class) })
			_, _ = c.Encrypt(t.Context(), "u", []byte("x"))
			if !slices.Equal(got, tt.want) {
				t.Errorf("%s: observed %q, want %q", name, got, tt.want)
			}
		}
	})
}

func noted(res *service.EncryptResponse, err error, ids ...string) func(context.Context) (*service.EncryptResponse, error) {
	return func(ctx context.Context) (*service.EncryptResponse, error) {
		for _, id := range ids {
			kmsclient.NoteRequestID(ctx, id)
		}
		return res, err
	}
}

// TestRequestIDOfNobody: a backend that is called without the wrapper has nowhere to note anything,
// and none of many callers takes the id of another.
func TestRequestIDOfNobody(t *testing.T) {
	kmsclient.NoteRequestID(t.Context(), "r1")
	type own struct{}
	b := &backend{encrypt: func(ctx context.Context) (*service.EncryptResponse, error) {
		id, _ := ctx.Value(own{}).(string)
		kmsclient.NoteRequestID(ctx, id)
		return &service.EncryptResponse{Ciphertext: []byte("c"), KeyID: id}, nil
	}}
	var mu sync.Mutex
	seen := 0
	c := newClient(t, b, func(c kmsclient.Call) {
		mu.Lock()
		defer mu.Unlock()
		if seen++; c.RequestID != c.KeyID || c.RequestID == "" {
			t.Errorf("the call of %q has the request ID %q", c.KeyID, c.RequestID)
		}
	})
	var wg sync.WaitGroup
	for i := range 64 {
		wg.Go(func() {
			if _, err := c.Encrypt(context.WithValue(t.Context(), own{}, fmt.Sprint("r", i)), "u", []byte("x")); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if seen != 64 {
		t.Errorf("%d calls observed", seen)
	}
}

// TestRequestIDForTheCaller tells a caller who asks for it the id of the attempt that succeeded,
// whatever stands between it and the backend.
func TestRequestIDForTheCaller(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &backend{}
		attempts := []func(context.Context) (*service.EncryptResponse, error){noted(nil, errors.New("x"), "r1"), noted(good, nil, "r2"), noted(good, nil)}
		b.encrypt = func(ctx context.Context) (*service.EncryptResponse, error) { return attempts[b.calls.Load()-1](ctx) }
		var observed []string
		outer := newClient(t, newClient(t, b, nil), func(c kmsclient.Call) { observed = append(observed, c.RequestID) })
		for _, want := range []string{"r2", ""} {
			ctx, id := kmsclient.WithRequestID(t.Context())
			if _, err := outer.Encrypt(ctx, "u", []byte("x")); err != nil || id() != want {
				t.Errorf("%q, %v; want %q", id(), err, want)
			}
		}
		if !slices.Equal(observed, []string{"r2", ""}) {
			t.Errorf("observed %q", observed)
		}
	})
}
