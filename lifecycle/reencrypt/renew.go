package reencrypt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// finding is the result of examining a value.
type finding int

const (
	noRule     finding = iota // covers the key
	isCurrent                 // stored as its rule requires
	isSkipped                 // it cannot be rewritten, which is recorded
	isDeferred                // its DEK seed was not unwrapped: it is retried later
	isToWrite
)

// found is a finding with its data.
type found struct {
	what     finding
	next     *item         // for isToWrite
	deferred deferredValue // for isDeferred
}

// renew returns the replacement of a value. If wait is set, it waits for a KMS that does not
// respond, until the KMS responds for other values.
func (r *run) renew(ctx context.Context, kv *mvccpb.KeyValue, wait bool) (f found, err error) {
	var first time.Time
	unanswered := 0
	err = r.retry(ctx, waitKMS, func() (err error) {
		// The current rules: after a reload, the old rules must not undo what the new ones have
		// written.
		rule := r.cfg.Rules().Of(kv.Key)
		if rule == nil {
			f.what = noRule
			return nil
		}
		seed, marker, hasSeed := inventory.SeedOf(rule, kv.Value)
		if pending, ok := r.deferred.isPending(seed); ok && wait {
			pending.key = string(kv.Key)
			f.what, f.deferred = isDeferred, pending
			return nil
		}
		if why, decided := r.deferred.verdict(seed); decided {
			r.skip(skippedRefused, kv.Key, why)
			f.what = isSkipped
			return nil
		}
		f.next, f.what, err = r.renewBy(ctx, rule, kv)
		failed, ok := errors.AsType[*notUnwrappedError](err)
		if !ok || !hasSeed || ctx.Err() != nil {
			return err
		}
		if first.IsZero() {
			first = time.Now()
		}
		unanswered++
		if wait && !failed.cause.Responded() {
			if state, _ := rule.Sealer.Recheck(kv.Value); unanswered < maxUnanswered || !state.LastGood.After(first) {
				return err
			}
		}
		f.what = isDeferred
		f.deferred = deferredValue{key: string(kv.Key), seed: seed, marker: marker, why: failed.cause.OfSeed(), last: time.Now()}
		return nil
	})
	if f.what == isToWrite {
		r.foundWork()
	}
	return f, err
}

// maxUnanswered is the number of calls for one value that a KMS may leave without a response, while
// it responds for other values, before the value is deferred.
const maxUnanswered = 2

// notUnwrappedError is a temporary failure of a KMS to unwrap a DEK seed.
type notUnwrappedError struct{ cause *keyring.Error }

func (e *notUnwrappedError) Error() string { return e.cause.Error() }

func (e *notUnwrappedError) Unwrap() error { return e.cause }

// whyPlaintext is the reason for skipping plaintext under a strict rule.
const whyPlaintext = "it is plaintext, and the rule refuses to read plaintext (allowPlaintextReads: false): it was written to etcd directly. " +
	"Find out which client wrote it; then delete it, write it again through a proxy, or encrypt it unchanged with reencrypt --encrypt-plaintext"

// renewBy is one attempt of renew. An error is temporary.
func (r *run) renewBy(ctx context.Context, rule *inventory.Rule, kv *mvccpb.KeyValue) (*item, finding, error) {
	plaintext, state, err := rule.Sealer.Inspect(ctx, kv.Key, kv.Value)
	if e, ok := errors.AsType[*keyring.Error](err); ok && (e.Kind == keyring.Unavailable || e.Responded()) {
		return nil, 0, &notUnwrappedError{e}
	}
	switch {
	case err != nil:
		r.skip(skippedUndecryptable, kv.Key, err.Error())
		return nil, isSkipped, nil
	case state == keyring.Current:
		return nil, isCurrent, nil
	case state == keyring.Foreign:
		r.skip(skippedForeign, kv.Key, "it was encrypted by a provider that the rule does not read")
		return nil, isSkipped, nil
	case state == keyring.Unencrypted && rule.Strict && !r.cfg.EncryptPlaintext:
		r.skip(skippedPlaintext, kv.Key, whyPlaintext)
		return nil, isSkipped, nil
	}
	value, err := rule.Sealer.Seal(ctx, kv.Key, plaintext)
	if unavailable(err) {
		return nil, 0, err
	}
	if err == nil {
		err = r.verify(ctx, rule, kv, plaintext, value)
	}
	if unavailable(err) {
		return nil, 0, err
	}
	if err != nil {
		r.skip(skippedFailed, kv.Key, err.Error())
		return nil, isSkipped, nil
	}
	return &item{key: string(kv.Key), value: value, revision: kv.ModRevision, lease: kv.Lease}, isToWrite, nil
}

// verify decrypts the replacement of a value, so that an encryption error loses no data. It returns
// an error if the replacement is no improvement.
func (r *run) verify(ctx context.Context, rule *inventory.Rule, kv *mvccpb.KeyValue, plaintext, value []byte) error {
	opened, state, err := rule.Sealer.Inspect(ctx, kv.Key, value)
	if err != nil {
		return err
	}
	if !bytes.Equal(opened, plaintext) {
		return errors.New("the new value does not decrypt to the old plaintext: it was not written")
	}
	if state != keyring.Current && sameEncryption(kv.Value, value) {
		return fmt.Errorf("encrypting it again would change nothing: the KMS provider %q encrypts under another key than the current one, or without all recovery copies", rule.WriteWith)
	}
	return nil
}

// sameEncryption reports whether two stored values were encrypted by one provider under one KMS
// key, with copies by the same recovery providers.
func sameEncryption(a, b []byte) bool {
	providerA, objectA, okA := envelope.Split(a)
	providerB, objectB, okB := envelope.Split(b)
	if !okA || !okB || !bytes.Equal(providerA, providerB) {
		return false
	}
	x, errX := envelope.Parse(objectA)
	y, errY := envelope.Parse(objectB)
	return errX == nil && errY == nil && x.Type == y.Type && x.KeyID == y.KeyID &&
		slices.Equal(slices.Sorted(maps.Keys(x.Annotations)), slices.Sorted(maps.Keys(y.Annotations)))
}

// unavailable reports whether an error of a sealer is temporary.
func unavailable(err error) bool {
	e, ok := errors.AsType[*keyring.Error](err)
	return ok && e.Kind == keyring.Unavailable
}
