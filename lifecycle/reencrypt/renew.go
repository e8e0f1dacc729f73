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
	noRule    finding = iota // holds for the key
	isCurrent                // as its rule writes it
	isLeft                   // it cannot be rewritten, which was told
	isAside                  // its DEK seed was not unwrapped: it is put aside
	isToWrite
)

// found is a finding with what belongs to it.
type found struct {
	what  finding
	next  *item    // to write, of isToWrite
	aside setAside // of isAside
}

// renew returns what to write instead of a value. If patient is set, it waits for a KMS that does
// not respond until that responds for other values.
func (r *run) renew(ctx context.Context, kv *mvccpb.KeyValue, patient bool) (f found, err error) {
	var first time.Time
	silences := 0
	err = r.patiently(ctx, waitKMS, func() (err error) {
		// The current rules: after a reload, the old rules must not undo what the new ones have
		// written.
		rule := r.cfg.Rules().Of(kv.Key)
		if rule == nil {
			f.what = noRule
			return nil
		}
		seed, marker, hasSeed := inventory.SeedOf(rule, kv.Value)
		if pending, ok := r.aside.isPending(seed); ok && patient {
			pending.key = string(kv.Key)
			f.what, f.aside = isAside, pending
			return nil
		}
		if why, decided := r.aside.verdict(seed); decided {
			r.leave(leftRefused, kv.Key, why)
			f.what = isLeft
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
		silences++
		if patient && !failed.cause.Answered() {
			if state, _ := rule.Sealer.Recheck(kv.Value); silences < maxSilences || !state.LastGood.After(first) {
				return err
			}
		}
		f.what = isAside
		f.aside = setAside{key: string(kv.Key), seed: seed, marker: marker, why: failed.cause.OfSeed(), last: time.Now()}
		return nil
	})
	if f.what == isToWrite {
		r.foundWork()
	}
	return f, err
}

// maxSilences is how often a KMS that responds for other values may fail to respond for one before
// that is deferred.
const maxSilences = 2

// notUnwrappedError is a temporary failure of a KMS to unwrap a DEK seed.
type notUnwrappedError struct{ cause *keyring.Error }

func (e *notUnwrappedError) Error() string { return e.cause.Error() }

func (e *notUnwrappedError) Unwrap() error { return e.cause }

// whyPlaintext is the reason for skipping plaintext under a strict rule.
const whyPlaintext = "it is plaintext, and the rule refuses to read plaintext (allowPlaintextReads: false): it was written past the proxies. " +
	"Find out who wrote it; then delete it, write it again through a proxy, or encrypt it as it is with reencrypt --encrypt-plaintext"

// renewBy is one attempt of renew. An error is temporary.
func (r *run) renewBy(ctx context.Context, rule *inventory.Rule, kv *mvccpb.KeyValue) (*item, finding, error) {
	plaintext, standing, err := rule.Sealer.Inspect(ctx, kv.Key, kv.Value)
	if e, ok := errors.AsType[*keyring.Error](err); ok && (e.Kind == keyring.Unavailable || e.Answered()) {
		return nil, 0, &notUnwrappedError{e}
	}
	switch {
	case err != nil:
		r.leave(leftUndecryptable, kv.Key, err.Error())
		return nil, isLeft, nil
	case standing == keyring.Current:
		return nil, isCurrent, nil
	case standing == keyring.Foreign:
		r.leave(leftForeign, kv.Key, "it was encrypted by a provider that the rule does not read")
		return nil, isLeft, nil
	case standing == keyring.Unencrypted && rule.Strict && !r.cfg.EncryptPlaintext:
		r.leave(leftPlaintext, kv.Key, whyPlaintext)
		return nil, isLeft, nil
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
		r.leave(leftFailed, kv.Key, err.Error())
		return nil, isLeft, nil
	}
	return &item{key: string(kv.Key), value: value, revision: kv.ModRevision, lease: kv.Lease}, isToWrite, nil
}

// verify decrypts what is to be written instead of a value, so that a fault of the encryption loses
// nothing, and returns an error if it is no improvement.
func (r *run) verify(ctx context.Context, rule *inventory.Rule, kv *mvccpb.KeyValue, plaintext, value []byte) error {
	opened, standing, err := rule.Sealer.Inspect(ctx, kv.Key, value)
	if err != nil {
		return err
	}
	if !bytes.Equal(opened, plaintext) {
		return errors.New("what was sealed anew opens to something else: it was not written")
	}
	if standing != keyring.Current && likeEachOther(kv.Value, value) {
		return fmt.Errorf("sealing it again would change nothing: the KMS provider %q seals under another key than the current one, or without all recovery copies", rule.WriteWith)
	}
	return nil
}

// likeEachOther reports whether two stored values were encrypted by one provider under one KMS key,
// with copies by the same recovery providers.
func likeEachOther(a, b []byte) bool {
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
