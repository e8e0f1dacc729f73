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

// openMode says how an object is decrypted.
type openMode struct {
	inPlace bool // the plaintext is written over the object
	try     bool // without a KMS call, or else the error is [ErrWouldBlock] and the object is unchanged
}

// open opens an object of this provider; if need be with a recovery copy that one of rings unwraps. e is the seed that was used; it is nil when it did
// not come to that.
func (r *Ring) open(ctx context.Context, etcdKey, object []byte, mode openMode, rings []*Ring) (plaintext []byte, e *entry, err *Error) {
	if st := r.state.Load(); st.revoked != nil && !kmsclient.ReasonOf(st.revoked).Gone() {
		return nil, nil, r.errorf(KeyUnusable, st.revoked, "%s", describe(st.revoked))
	}
	now := time.Now()
	e, l, err := r.lookup(object, rings, now)
	switch {
	case err != nil:
		return nil, nil, err
	case e != nil:
		r.cfg.Observer.Seed(r.cfg.Provider, l.event)
	case mode.try:
		return nil, nil, errWouldBlock
	default:
		if e, err = r.seedOf(ctx, &l, rings); err != nil {
			return nil, nil, err
		}
		r.remember(&l, e)
	}
	verified := e.proven.Load()
	var oerr error
	if mode.inPlace && verified { // else the object may be needed again
		plaintext, oerr = e.seed.OpenInPlace(&r.recent, etcdKey, l.data)
	} else {
		plaintext, oerr = e.seed.Open(nil, etcdKey, l.data)
	}
	if oerr != nil {
		if !verified {
			if plaintext, err = r.openAgain(ctx, e, etcdKey, object, mode.try); err == nil || err.Kind != Corrupt {
				return plaintext, e, err
			}
		}
		return nil, e, r.errorf(Corrupt, oerr, "the data does not open under this etcd key and KMS key ID %q: it was changed, truncated or moved here", e.keyID)
	}
	if !verified {
		e.proven.Store(true)
	}
	if e.rescue != nil {
		r.noteRescue(e, now)
	}
	return plaintext, e, nil
}

// lookup is what an object says of its seed, and what the cache has of that.
type lookup struct {
	data   []byte           // the object's encrypted data
	rest   []byte           // its bytes behind that, if they are a key of the hot table; else nil
	header *envelope.Header // nil if the hot table had the seed
	digest digest
	stale  *entry // a cached seed past its TTL
	event  Event  // of the seed that was found
}

// lookup returns the seed of an object that may be used without waiting for a KMS, or nil.
func (r *Ring) lookup(object []byte, rings []*Ring, now time.Time) (e *entry, l lookup, err *Error) {
	data, rest, cut := envelope.Cut(object)
	if cut {
		if e := r.hot.get(rest); e != nil && r.cfg.Cache.ageOf(e, now) == fresh {
			r.cfg.Cache.touch(e, now)
			return e, lookup{data: data, event: EventHit}, nil
		}
	}
	o, perr := envelope.Parse(object)
	if perr != nil {
		return nil, l, r.errorf(Corrupt, perr, "%v", perr)
	}
	l = lookup{data: o.Data, header: &o.Header, digest: digestOf(r.cfg.Provider, &o.Header)}
	// Only if Parse found the same data is rest the header and nothing else.
	if cut && len(data) == len(o.Data) && &data[0] == &o.Data[0] {
		l.rest = rest
	}
	if e = r.cachedSeed(&l, rings, now); e != nil {
		r.remember(&l, e)
	}
	return e, l, nil
}

// cachedSeed returns a cached seed that may be used without waiting for a KMS, or nil.
func (r *Ring) cachedSeed(l *lookup, rings []*Ring, now time.Time) *entry {
	if e := r.cfg.Cache.get(l.digest); e != nil {
		switch r.cfg.Cache.ageOf(e, now) {
		case fresh:
			l.event = EventHit
			return e
		case ageing:
			l.stale = e
		case expired:
		}
	}
	if l.stale == nil {
		l.event = EventHit
		return r.cachedSpare(l.digest, l.header, rings, now)
	}
	l.event = EventStale
	if now.UnixNano() < l.stale.retry.Load() {
		return l.stale
	}
	if st := r.state.Load(); !st.healthy && st.revoked == nil && r.refused(l.digest) == nil {
		// The KMS does not answer: no caller waits for it. The call renews the seed if it does.
		r.flight(l.digest, cloneHeader(l.header))
		return l.stale
	}
	return nil
}

// remember puts a seed into the hot table. What a recovery copy gave is for rules that name its provider.
func (r *Ring) remember(l *lookup, e *entry) {
	if l.rest != nil && e.by == r && e != l.stale {
		r.hot.put(l.rest, e)
	}
}

// seedOf returns the seed behind a header that the cache does not have: from the KMS, or, where that does not give it, from a copy that one of rings unwraps.
func (r *Ring) seedOf(ctx context.Context, l *lookup, rings []*Ring) (*entry, *Error) {
	if ctx.Err() == nil { // or the caller only asks whether it would have to wait
		r.cfg.Observer.Seed(r.cfg.Provider, EventMiss)
	}
	h := cloneHeader(l.header) // the calls may outlive the caller, and so the message that the header points into
	e, err := r.fromKMS(ctx, l.digest, h, l.stale)
	if err == nil || !h.HasCopies() {
		return e, err
	}
	return r.rescueSeed(ctx, h, r.spares(l.digest, h, rings), err)
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
		return kmsclient.ClassOf(err) == kmsclient.ClassDenied && time.Since(stale.fetched) < r.cfg.Cache.ttl+r.cfg.RevokeWithin
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
			if kmsclient.ClassOf(err) == kmsclient.ClassInvalid {
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
	switch kmsclient.ClassOf(err) {
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
