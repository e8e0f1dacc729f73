package keyring

import (
	"context"
	"crypto/sha256"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// fetch returns a seed that the cache does not have: unwrapped by the KMS or, if the KMS does not
// unwrap it, from a recovery copy that one of rings unwraps.
func (s *seeds) fetch(ctx context.Context, l *lookup, rings []*Ring) (*entry, *Error) {
	if ctx.Err() == nil {
		s.p.cfg.Observer.Seed(s.p.cfg.Provider, EventMiss)
	}
	// the calls may outlive the caller, and so the message that the header points into
	h := cloneHeader(l.header)
	e, err := s.fromKMS(ctx, l.digest, h, l.stale)
	if err == nil || !h.HasCopies() {
		return e, err
	}
	return s.copies.fetch(ctx, h, s.copies.find(l.digest, h, rings), err)
}

// result is what a flight returns.
type result struct {
	entry *entry
	err   *Error
}

// flight has call make a KMS call for a seed. Concurrent callers with one id share a call.
func (s *seeds) flight(id string, call func() (*entry, *Error)) <-chan singleflight.Result {
	return s.flights.DoChan(id, func() (any, error) {
		e, err := call()
		return result{e, err}, nil
	})
}

// await returns the result of a flight, or an error once ctx has ended.
func (s *seeds) await(ctx context.Context, flight <-chan singleflight.Result, what string) (*entry, *Error) {
	select {
	case <-ctx.Done():
		return nil, s.p.errorf(Unavailable, context.Cause(ctx), "the caller canceled while %s", what)
	case a := <-flight:
		r := a.Val.(result) // flight returns nothing else
		return r.entry, r.err
	}
}

// unwrapping is the flight that has the ring's own KMS unwrap a seed.
func (s *seeds) unwrapping(d digest, h *envelope.Header) <-chan singleflight.Result {
	return s.flight(string(d[:]), func() (*entry, *Error) { return s.unwrap(d, h) })
}

// fromKMS returns the seed as the ring's own KMS unwraps it, or stale, the cached seed past its
// TTL, if that may be used.
func (s *seeds) fromKMS(ctx context.Context, d digest, h *envelope.Header, stale *entry) (e *entry, err *Error) {
	if revoked := s.p.state.Load().revoked; revoked != nil {
		// no call with a revoked key
		return nil, s.p.markLost(s.p.errorf(KeyUnusable, revoked, "%s", describe(revoked)), h, revoked)
	}
	if last := s.refusals.current(d); last != nil {
		err = s.refusals.failure("seed", h, last)
	} else if e, err = s.await(ctx, s.unwrapping(d, h), "its seed was unwrapped"); err == nil || ctx.Err() != nil {
		return e, err
	}
	if stale != nil && !stale.evicted.Load() && s.mayServe(stale, err) {
		s.p.cfg.Observer.Seed(s.p.cfg.Provider, EventStale)
		return stale, nil
	}
	return nil, err
}

// mayServe reports whether a seed past its TTL may still decrypt values although unwrapping it has
// just failed with err.
func (s *seeds) mayServe(stale *entry, err *Error) bool {
	switch err.Kind {
	case Unavailable, SeedRefused:
		// behind a plugin that gives no reasons, an outage looks like the latter
		return true
	case KeyUnusable:
		// The seed of a key that is gone is lost. A denial may pass within RevokeWithin.
		return kmsclient.ClassOf(err) == kmsclient.ClassDenied && time.Since(stale.fetched) < s.p.cfg.Cache.ttl+s.p.cfg.RevokeWithin
	default:
		return false
	}
}

// unwrap has the KMS unwrap a seed, and caches it.
func (s *seeds) unwrap(d digest, h *envelope.Header) (*entry, *Error) {
	old := s.p.cfg.Cache.get(d)
	if old != nil && s.p.cfg.Cache.ageOf(old, time.Now()) == fresh {
		return old, nil // unwrapped since the caller looked it up
	}
	if last := s.refusals.current(d); last != nil {
		return nil, s.refusals.failure("seed", h, last)
	}
	gen := s.p.revocations()
	seed, sum, err := s.secret(s.attempts(d), "seed", d, h)
	if err != nil {
		if old != nil {
			old.retry.Store(time.Now().Add(s.p.cfg.FailingPollInterval).UnixNano())
			if kmsclient.ClassOf(err.Err) == kmsclient.ClassInvalid {
				s.p.cfg.Cache.evict(old)
			}
		}
		return nil, err
	}
	e := s.newEntry(d, h, seed)
	e.sum = sum
	if old != nil {
		e.verified.Store(old.verified.Load())
	}
	// Under the lock, a revocation is either before this, and seen here, or after it, and evicts
	// the entry.
	s.p.mu.Lock()
	defer s.p.mu.Unlock()
	if s.p.revoked != gen {
		return nil, s.p.errorf(Unavailable, nil, "the key's state changed while a seed was unwrapped")
	}
	s.p.cfg.Cache.put(e)
	return e, nil
}

// secret has the KMS unwrap a header, and returns the seed and the digest of its secret. what is
// "seed", or "copy" for a recovery copy; d identifies it among the refusals.
func (s *seeds) secret(ctx context.Context, what string, d digest, h *envelope.Header) (seed *envelope.Seed, sum [sha256.Size]byte, _ *Error) {
	// a plaintext that cannot be a seed counts as a broken contract
	ctx = kmsclient.ExpectLength(ctx, func(n int) error { return envelope.CheckSeedLength(h.Type, n) })
	plain, err := s.decrypt(ctx, h)
	if err == nil {
		if seed, err = envelope.NewSeed(h.Type, plain); err != nil {
			err = brokenContract("Decrypt", err.Error())
		}
	}
	if err != nil {
		return nil, sum, s.refusals.failure(what, h, s.refusals.note(d, err))
	}
	s.refusals.lru.Remove(d)
	return seed, sha256.Sum256(plain), nil
}

// attempts returns the context of the calls for a seed.
func (s *seeds) attempts(d digest) context.Context {
	if s.refusals.lru.Contains(d) { // one more attempt is enough for a seed that was refused before
		return kmsclient.OneAttempt(s.calls.base)
	}
	return s.calls.base
}

// decrypt has the KMS unwrap the seed in a value's header. If the KMS refuses the key, it evicts
// the seeds of the header's key ID. It does so for that ID alone, since a stored value can name
// any.
func (s *seeds) decrypt(ctx context.Context, h *envelope.Header) ([]byte, error) {
	plain, err := s.calls.unwrap(ctx, h)
	switch kmsclient.ClassOf(err) {
	case kmsclient.ClassKeyUnusable:
		s.p.suspect()
		s.evictKeys(func(id string) bool { return id == h.KeyID }, h.KeyID, err)
	case kmsclient.ClassDenied:
		s.p.suspect()
		if s.calls.deniedFor(s.p.keyOf(h.KeyID), false) >= s.p.cfg.RevokeWithin {
			s.evictKeys(func(id string) bool { return id == h.KeyID }, h.KeyID, err)
		}
	}
	return plain, err
}

// recheck is the result of unwrapping an unverified seed again. It does not change.
type recheck struct {
	// the KMS returned the same seed, so that a value that does not decrypt is damaged
	same  bool
	calls int       // how often the seed was unwrapped again
	until time.Time // the KMS is not called again before
}

// openAgain decrypts a value that an unverified seed has not decrypted. A wrong response of the KMS
// must not make a value look damaged, so the seed is unwrapped once more, and then less and less
// often. The error is of kind Corrupt if the KMS returned the same seed, and [ErrWouldBlock] if
// mode says that the KMS must not be called.
func (s *seeds) openAgain(ctx context.Context, e *entry, etcdKey, object []byte, mode Mode) ([]byte, *Error) {
	if last := e.recheck.Load(); last != nil && time.Now().Before(last.until) {
		return nil, s.undecryptable(e, last)
	}
	if mode.Try {
		return nil, ErrWouldBlock
	}
	if ctx.Err() != nil {
		return nil, s.p.errorf(Unavailable, context.Cause(ctx), "the caller canceled before the DEK seed of a value that does not decrypt was unwrapped again")
	}
	h := e.header
	if e.unwrapper == s.ring && h == nil {
		if o, err := envelope.Parse(object); err == nil {
			h = cloneHeader(&o.Header)
		}
	}
	if h == nil {
		s.p.cfg.Cache.evict(e)
		return nil, s.p.errorf(Unavailable, nil, "the data does not decrypt, and the annotations of its DEK seed are too large to keep for unwrapping it again")
	}
	now, err := s.await(ctx, s.flight("again"+string(e.digest[:]), func() (*entry, *Error) { return s.unwrapAgain(e, h) }), "a seed was unwrapped again")
	if err != nil {
		return nil, err
	}
	if o, err := envelope.Parse(object); now != e && err == nil {
		if plaintext, err := now.seed.Open(mode.Dst, etcdKey, o.Data); err == nil {
			now.verified.Store(true)
			return plaintext, nil
		}
	}
	return nil, s.undecryptable(now, now.recheck.Load())
}

// undecryptable returns the error of a value that a seed does not decrypt.
func (s *seeds) undecryptable(e *entry, d *recheck) *Error {
	if d == nil || d.same { // nil: it has decrypted another value meanwhile
		return s.p.errorf(Corrupt, nil, "the data does not decrypt")
	}
	cause := brokenContract("Decrypt", "two different seeds for one wrapped seed")
	return s.p.errorf(SeedRefused, cause, "the seed under KMS key ID %q: %s", Clip(e.keyID), describe(cause))
}

// unwrapAgain has the KMS unwrap the seed of e again, and returns the entry that is cached now: e,
// or one with the other seed that the KMS returned.
func (s *seeds) unwrapAgain(e *entry, h *envelope.Header) (*entry, *Error) {
	last := e.recheck.Load()
	if e.verified.Load() || last != nil && time.Now().Before(last.until) {
		return e, nil // by another caller
	}
	calls, cancel := context.WithCancel(e.unwrapper.calls.base)
	defer cancel()
	defer context.AfterFunc(s.calls.base, cancel)()
	gen := e.unwrapper.p.revocations()
	seed, sum, err := e.unwrapper.seeds.secret(calls, "seed", e.digest, h)
	if err != nil {
		s.p.cfg.Cache.evict(e)
		return nil, err
	}
	next := &recheck{same: sum == e.sum, calls: 1}
	if last != nil {
		next.calls += last.calls
	}
	next.until = time.Now().Add(s.refusals.pauseAfter(next.calls))
	if next.same {
		e.recheck.Store(next)
		return e, nil
	}
	s.p.cfg.Cache.evict(e)
	other := &entry{
		ring: e.ring, digest: e.digest, seed: seed, typ: e.typ, keyID: e.keyID, copies: e.copies, unwrapper: e.unwrapper, unwrapperKeyID: e.unwrapperKeyID, sum: sum, header: e.header,
		fetched: time.Now(), copyUse: e.copyUse, copyReason: e.copyReason,
	}
	other.recheck.Store(next)
	s.p.cfg.Cache.put(other)
	if e.unwrapper.p.revocations() != gen || s.p.isDisabled() && !e.unwrapper.overrides() {
		s.p.cfg.Cache.evict(other)
		return nil, s.p.errorf(Unavailable, nil, "the key's state changed while a seed was unwrapped again")
	}
	return other, nil
}
