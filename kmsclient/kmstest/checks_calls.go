package kmstest

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// promptly is how long a call may take whose context has ended. It is a limit for broken backends;
// honest ones return at once.
const promptly = 5 * time.Second

func (x *subject) mayBeDamaged(c kmsclient.Class) bool { return slices.Contains(x.damaged, c) }

func (x *subject) maySayNoKey(c kmsclient.Class) bool { return c != kmsclient.ClassUnavailable }

// judge returns an error unless err is one of a class that may is true of.
func (x *subject) judge(err error, what string, may func(kmsclient.Class) bool) error {
	if err == nil {
		return fmt.Errorf("%s: no error", what)
	}
	if x.opaque {
		return nil
	}
	if !hasReason(err) {
		return fmt.Errorf("%s: the error wraps no *kmsclient.Error: %w", what, err)
	}
	if class := kmsclient.ClassOf(err); !may(class) {
		return fmt.Errorf("%s: the error's class is %q: %w", what, class, err)
	}
	return nil
}

// concurrency unwraps one request from many goroutines, and wraps and unwraps secrets that differ.
func concurrency(ctx context.Context, x *subject) error {
	shared, err := x.wrap(ctx, canary)
	if err != nil {
		return err
	}
	const workers, rounds = 16, 4
	errs := make([]error, workers)
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for r := range rounds {
				if errs[w] = x.concurrently(ctx, shared, fmt.Sprintf("secret %d of worker %d", r, w)); errs[w] != nil {
					return
				}
			}
		})
	}
	wg.Wait()
	return cmp.Or(errs...)
}

func (x *subject) concurrently(ctx context.Context, shared *service.DecryptRequest, secret string) error {
	req, err := x.wrap(ctx, secret)
	if err != nil {
		return err
	}
	if err := x.opens(ctx, req, secret); err != nil {
		return err
	}
	// not cloned: the race detector sees a change
	if got, err := x.Decrypt(ctx, shared); err != nil || string(got) != canary {
		return fmt.Errorf("unwrap what others unwrap too: %d bytes, %w", len(got), orNone(err))
	}
	if x.generator != nil {
		key, err := x.generate(ctx)
		if err != nil {
			return err
		}
		if err := x.opens(ctx, request(key), string(key.Plaintext)); err != nil {
			return err
		}
	}
	_, err = x.Status(ctx)
	return err
}

// operations returns each operation as a call with a context.
func (x *subject) operations(ctx context.Context) (map[string]func(context.Context) error, error) {
	req, err := x.wrap(ctx, canary)
	if err != nil {
		return nil, err
	}
	ops := map[string]func(context.Context) error{
		opEncrypt: func(ctx context.Context) error { _, err := x.Encrypt(ctx, []byte(canary)); return err },
		opDecrypt: func(ctx context.Context) error { _, err := x.Decrypt(ctx, clone(req)); return err },
		opStatus:  func(ctx context.Context) error { _, err := x.Status(ctx); return err },
	}
	if x.generator != nil {
		ops[opGenerate] = func(ctx context.Context) error { _, err := x.generate(ctx); return err }
	}
	return ops, nil
}

func cancelled(ctx context.Context, x *subject) error {
	ended, cancel := context.WithCancel(ctx)
	cancel()
	return x.endsWith(ctx, ended, context.Canceled)
}

func expired(ctx context.Context, x *subject) error {
	ended, cancel := context.WithDeadline(ctx, time.Now().Add(-time.Second))
	defer cancel()
	return x.endsWith(ctx, ended, context.DeadlineExceeded)
}

// endsWith calls each operation with a context that has ended.
func (x *subject) endsWith(ctx, ended context.Context, want error) error {
	ops, err := x.operations(ctx)
	if err != nil {
		return err
	}
	for op, call := range ops {
		done := make(chan error, 1)
		go func() { done <- call(ended) }()
		select {
		case err := <-done:
			if !errors.Is(err, want) {
				return fmt.Errorf("%s with a context that has ended: got %w, want %w", op, orNone(err), want)
			}
		case <-time.After(promptly):
			return fmt.Errorf("%s with a context that has ended does not return", op)
		}
	}
	return nil
}

// cancelledUnderWay cancels at any moment of a call, which then succeeds or fails with the
// context's error, but with no other.
func cancelledUnderWay(ctx context.Context, x *subject) error {
	ops, err := x.operations(ctx)
	if err != nil {
		return err
	}
	for op, call := range ops {
		for range 10 {
			during, cancel := context.WithCancel(ctx)
			go cancel()
			err := call(during)
			cancel()
			if err != nil && !errors.Is(err, context.Canceled) {
				return fmt.Errorf("%s, cancelled under way: got %w", op, err)
			}
		}
	}
	return nil
}

func orNone(err error) error {
	if err == nil {
		return errors.New("no error")
	}
	return err
}

// arguments sees whether calls change or keep what they were given.
func arguments(ctx context.Context, x *subject) error {
	data := append(make([]byte, 0, 64), canary...)
	res, err := x.Encrypt(ctx, data)
	if err != nil {
		return err
	}
	if string(data) != canary || !bytes.Equal(data[len(data):cap(data)], make([]byte, cap(data)-len(data))) {
		return errors.New("Encrypt changed its argument")
	}
	fill(data)
	whole := clone(&service.DecryptRequest{Ciphertext: res.Ciphertext, KeyID: res.KeyID, Annotations: res.Annotations})
	if err := x.opens(ctx, whole, canary); err != nil {
		return fmt.Errorf("after Encrypt's argument was overwritten: %w", err)
	}

	req := clone(whole)
	got, err := x.Decrypt(ctx, req)
	if err != nil {
		return err
	}
	if req.KeyID != whole.KeyID || !bytes.Equal(req.Ciphertext, whole.Ciphertext) || !maps.EqualFunc(req.Annotations, whole.Annotations, bytes.Equal) {
		return errors.New("Decrypt changed its argument")
	}
	fill(req.Ciphertext)
	spoil(req.Annotations)
	if string(got) != canary {
		return errors.New("what Decrypt returned is part of its argument")
	}
	if err := x.opens(ctx, whole, canary); err != nil {
		return fmt.Errorf("after Decrypt's argument was overwritten: %w", err)
	}
	return nil
}

// results sees whether the caller owns what calls return, to the end of its capacity.
func results(ctx context.Context, x *subject) error {
	res, err := x.Encrypt(ctx, []byte(canary))
	if err != nil {
		return err
	}
	whole := clone(&service.DecryptRequest{Ciphertext: res.Ciphertext, KeyID: res.KeyID, Annotations: res.Annotations})
	fill(res.Ciphertext)
	spoil(res.Annotations)
	for range 2 {
		got, err := x.Decrypt(ctx, clone(whole))
		if err != nil {
			return fmt.Errorf("after Encrypt's answer was overwritten: %w", err)
		}
		if string(got) != canary {
			return fmt.Errorf("after what Decrypt returned was overwritten: %d bytes that were not wrapped", len(got))
		}
		fill(got)
	}
	s, err := x.Status(ctx)
	if err != nil {
		return err
	}
	s.KeyID, s.Healthz = "overwritten", "overwritten"
	if s, err = x.Status(ctx); err != nil {
		return err
	}
	if s.KeyID == "overwritten" || s.Healthz == "overwritten" {
		return errors.New("two calls of Status return the same memory")
	}
	again, err := x.wrap(ctx, canary)
	if err != nil {
		return err
	}
	return errors.Join(x.opens(ctx, again, canary), x.opens(ctx, whole, canary))
}

// request returns what unwraps a data key; it shares nothing with the key.
func request(key *kmsclient.DataKey) *service.DecryptRequest {
	return clone(&service.DecryptRequest{Ciphertext: key.Ciphertext, KeyID: key.KeyID, Annotations: key.Annotations})
}

// fill overwrites a slice to the end of its capacity.
func fill(b []byte) {
	b = b[:cap(b)]
	for i := range b {
		b[i] = 0xa5
	}
}

// spoil overwrites the values of a map, and the map.
func spoil(m map[string][]byte) {
	for _, v := range m {
		fill(v)
	}
	clear(m)
}
