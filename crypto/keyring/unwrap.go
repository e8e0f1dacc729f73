package keyring

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"maps"
	"slices"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// open opens an object of this provider, over itself if inPlace; if need be with a recovery copy that one of rings unwraps. e is the seed that
// was used; it is nil when it did not come to that.
func (r *Ring) open(ctx context.Context, etcdKey, object []byte, inPlace bool, rings []*Ring) (plaintext []byte, e *entry, err *Error) {
	if st := r.state.Load(); st.revoked != nil && !isGone(st.revoked) {
		return nil, nil, r.errorf(KeyUnusable, st.revoked, "%s", describe(st.revoked))
	}
	data, rest, cut := envelope.Cut(object)
	if cut {
		e = r.hot.get(rest)
	}
	now := time.Now()
	if e != nil && r.cfg.Cache.ageOf(e, now) == fresh {
		r.cfg.Cache.touch(e, now)
		r.cfg.Observer.Seed(r.cfg.Provider, EventHit)
	} else {
		o, perr := envelope.Parse(object)
		if perr != nil {
			return nil, nil, r.errorf(Corrupt, perr, "%v", perr)
		}
		if e, err = r.seedOf(ctx, &o.Header, rings); err != nil {
			return nil, nil, err
		}
		// Only if Parse found the same data is rest the header and nothing else. What a recovery copy gave is for rules that name its provider.
		if cut && e.by == r && len(data) == len(o.Data) && &data[0] == &o.Data[0] {
			r.hot.put(rest, e)
		}
		data = o.Data
	}
	var oerr error
	if inPlace {
		plaintext, oerr = e.seed.OpenInPlace(&r.recent, etcdKey, data)
	} else {
		plaintext, oerr = e.seed.Open(nil, etcdKey, data)
	}
	if oerr != nil {
		if !e.proven.Load() {
			if plaintext, err = r.openAgain(ctx, e, etcdKey, object, !inPlace); err == nil || err.Kind != Corrupt {
				return plaintext, e, err
			}
		}
		return nil, e, r.errorf(Corrupt, oerr, "the data does not open under this etcd key and KMS key ID %q: it was changed, truncated or moved here", e.keyID)
	}
	if !e.proven.Load() {
		e.proven.Store(true)
	}
	if e.rescue != nil {
		r.noteRescue(e, now)
	}
	return plaintext, e, nil
}

// seedOf returns the seed behind a header: from the cache, from the KMS, or, where that does not give it, from a copy that one of rings unwraps.
func (r *Ring) seedOf(ctx context.Context, h *envelope.Header, rings []*Ring) (*entry, *Error) {
	d := digestOf(r.cfg.Provider, h)
	now := time.Now()
	var stale *entry
	if e := r.cfg.Cache.get(d); e != nil {
		switch r.cfg.Cache.ageOf(e, now) {
		case fresh:
			r.cfg.Observer.Seed(r.cfg.Provider, EventHit)
			return e, nil
		case ageing:
			stale = e
		case expired:
		}
	}
	if stale != nil && now.UnixNano() < stale.retry.Load() {
		r.cfg.Observer.Seed(r.cfg.Provider, EventStale)
		return stale, nil
	}
	if stale == nil {
		if e := r.cachedSpare(d, h, rings, now); e != nil {
			r.cfg.Observer.Seed(r.cfg.Provider, EventHit)
			return e, nil
		}
	}
	if ctx.Err() == nil { // or the caller only asks whether it would have to wait
		r.cfg.Observer.Seed(r.cfg.Provider, EventMiss)
	}
	h = cloneHeader(h) // the calls may outlive the caller, and so the message that h points into
	e, err := r.fromKMS(ctx, d, h, stale)
	if err == nil || !h.HasCopies() {
		return e, err
	}
	return r.rescueSeed(ctx, h, r.spares(d, h, rings), err)
}

// flight is the one call to the ring's own KMS for all who want a seed at a time.
func (r *Ring) flight(d digest, h *envelope.Header) <-chan singleflight.Result {
	return r.flights.DoChan(string(d[:]), func() (any, error) {
		e, err := r.unwrap(d, h)
		if err != nil {
			return nil, err
		}
		return e, nil
	})
}

// fromKMS returns the seed as the ring's own KMS unwraps it, or stale, a cached one past its TTL, where that may serve.
func (r *Ring) fromKMS(ctx context.Context, d digest, h *envelope.Header, stale *entry) (*entry, *Error) {
	if revoked := r.state.Load().revoked; revoked != nil {
		return nil, r.markLost(r.errorf(KeyUnusable, revoked, "%s", describe(revoked)), h, revoked) // a revoked provider is not asked for values
	}
	if known := r.refused(d); known != nil {
		err := r.notUnwrapped("seed", h, known)
		if stale != nil && !stale.dead.Load() && r.mayServe(stale, err) {
			r.cfg.Observer.Seed(r.cfg.Provider, EventStale)
			return stale, nil
		}
		return nil, err
	}
	answer := r.flight(d, h)
	if stale != nil && !r.state.Load().healthy {
		// The KMS is known not to answer: nobody waits for it. The call goes on and renews the seed if it does.
		r.cfg.Observer.Seed(r.cfg.Provider, EventStale)
		return stale, nil
	}
	select {
	case <-ctx.Done():
		return nil, r.errorf(Unavailable, context.Cause(ctx), "the caller went away while its seed was unwrapped")
	case a := <-answer:
		if a.Err == nil {
			return a.Val.(*entry), nil
		}
		err, ok := errors.AsType[*Error](a.Err)
		if !ok {
			err = r.errorf(Unavailable, a.Err, "the seed was not unwrapped")
		}
		if stale != nil && !stale.dead.Load() && r.mayServe(stale, err) {
			r.cfg.Observer.Seed(r.cfg.Provider, EventStale)
			return stale, nil
		}
		return nil, err
	}
}

// mayServe reports whether a seed past its TTL may still open values although its unwrapping has just failed with err.
func (r *Ring) mayServe(stale *entry, err *Error) bool {
	switch err.Kind {
	case Unavailable, SeedRefused: // behind a plugin that gives no reasons, an outage looks like the latter
		return true
	case KeyUnusable:
		// A key that is gone has taken the seed with it. A denial is given the time in which it counts as passing.
		return classOf(err) == kmsclient.ClassDenied && time.Since(stale.fetched) < r.cfg.Cache.ttl+r.cfg.RevokeWithin
	default:
		return false
	}
}

// expectSeed returns a context with which a Decrypt whose plaintext cannot be a seed of the type is
// counted as a broken contract.
func expectSeed(ctx context.Context, typ envelope.Type) context.Context {
	return kmsclient.ExpectLength(ctx, func(n int) error { return envelope.CheckSeedLength(typ, n) })
}

// unwrap asks the KMS.
func (r *Ring) unwrap(d digest, h *envelope.Header) (*entry, error) {
	old := r.cfg.Cache.get(d)
	if old != nil && r.cfg.Cache.ageOf(old, time.Now()) == fresh {
		return old, nil // unwrapped between the caller's look and this call
	}
	if known := r.refused(d); known != nil {
		return nil, r.notUnwrapped("seed", h, known)
	}
	gen := r.generation()
	plain, err := r.decrypt(expectSeed(r.attempts(d), h.Type), h)
	if err != nil {
		if old != nil {
			old.retry.Store(time.Now().Add(r.cfg.FailingPollInterval).UnixNano())
			if classOf(err) == kmsclient.ClassInvalid {
				r.cfg.Cache.drop(old)
			}
		}
		return nil, r.notUnwrapped("seed", h, r.noteRefusal(d, err))
	}
	seed, err := envelope.NewSeed(h.Type, plain)
	if err != nil { // of a length that nobody wraps: the answer is at fault, and not the value
		return nil, r.notUnwrapped("seed", h, r.noteRefusal(d, &contractError{op: "Decrypt", what: err.Error()}))
	}
	r.refusals.Remove(d)
	e := r.newEntry(d, h, seed)
	e.sum = sha256.Sum256(plain)
	if old != nil {
		e.proven.Store(old.proven.Load())
	}
	// Under the lock a revocation comes either before, and is seen here, or after, and drops the entry.
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.gen != gen {
		return nil, r.errorf(Unavailable, nil, "the key's state changed while a seed was unwrapped")
	}
	r.cfg.Cache.put(e)
	return e, nil
}

// attempts returns the context of the calls for a seed.
func (r *Ring) attempts(d digest) context.Context {
	if r.askedBefore(d) {
		return kmsclient.OneAttempt(r.base)
	}
	return r.base
}

// decrypt asks the KMS for the secret behind a value's header, and draws the conclusions for the header's key ID. They are for that ID alone, since
// a stored value can name any.
func (r *Ring) decrypt(ctx context.Context, h *envelope.Header) ([]byte, error) {
	plain, err := r.ask(ctx, h)
	switch classOf(err) {
	case kmsclient.ClassKeyUnusable:
		r.doubt()
		r.dropKeys(func(id string) bool { return id == h.KeyID }, h.KeyID, err)
	case kmsclient.ClassDenied:
		r.doubt()
		if r.deniedFor(r.keyOf(h.KeyID), false) >= r.cfg.RevokeWithin {
			r.dropKeys(func(id string) bool { return id == h.KeyID }, h.KeyID, err)
		}
	}
	return plain, err
}

func (r *Ring) newEntry(d digest, h *envelope.Header, seed *envelope.Seed) *entry {
	return &entry{
		ring: r, digest: d, seed: seed, typ: h.Type, keyID: h.KeyID, copies: copiesIn(h), fetched: time.Now(),
		by: r, byKeyID: h.KeyID, header: keep(h),
	}
}

// keep returns what unwrapping a seed again needs, or nil if that is too much to keep.
func keep(h *envelope.Header) *envelope.Header {
	own := *h
	own.Annotations = h.Own()
	size := 0
	for k, v := range own.Annotations {
		size += len(k) + len(v)
	}
	if size > maxKept {
		return nil
	}
	return cloneHeader(&own)
}

// maxKept is how many bytes of annotations are kept with a cached seed.
const maxKept = 4096

func cloneHeader(h *envelope.Header) *envelope.Header {
	c := &envelope.Header{Type: h.Type, KeyID: h.KeyID, Source: bytes.Clone(h.Source), Annotations: maps.Clone(h.Annotations)}
	for k, v := range c.Annotations {
		c.Annotations[k] = slices.Clone(v)
	}
	return c
}

// clip shortens what came out of a stored value or a request for an error's text.
func clip[T string | []byte](s T) string {
	if len(s) > 256 {
		return string(s[:256]) + "…"
	}
	return string(s)
}
