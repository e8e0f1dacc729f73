package keyring

import (
	"bytes"
	"context"
	"maps"
	"slices"
	"time"

	"golang.org/x/sync/singleflight"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring/internal/hottable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// seeds finds the DEK seed of a stored value, in the cache or by the KMS, and decrypts with it.
type seeds struct {
	ring     *Ring
	p        *provider
	calls    *caller
	refusals *refusals
	copies   *copyReader

	flights singleflight.Group // of calls for one seed
	hot     hottable.Table[entry]
	recent  envelope.Recent
	begun   time.Time // when the seconds of recent begin
}

// cipherIdle is how long a cipher is kept that no value needs, at least. A health check drops it.
const cipherIdle = time.Minute

// expire drops the ciphers that no value has needed for cipherIdle.
func (s *seeds) expire() {
	if old := time.Since(s.begun) - cipherIdle; old > 0 {
		s.recent.Expire(seconds(old))
	}
}

func seconds(d time.Duration) uint32 { return uint32(d / time.Second) } //nolint:gosec // of a process

// openHot decrypts an object with a verified seed of the hot table, the way of nearly all values.
// It appends the plaintext to dst. It returns nil for any other object, and for one that does not
// decrypt, without counting it: then open is to decide.
func (s *seeds) openHot(dst, etcdKey, object []byte) []byte {
	data, rest, ok := envelope.Cut(object)
	if !ok || s.p.state.Load().revoked != nil {
		return nil
	}
	e := s.hot.Get(rest)
	if e == nil || e.copyUse != nil || !e.verified.Load() {
		return nil
	}
	now := time.Since(s.begun) // half the cost of time.Now
	old := now - e.fetched.Sub(s.begun)
	if s.p.cfg.Cache.ageAfter(e, old) != fresh {
		return nil
	}
	plaintext, err := e.seed.OpenRecent(&s.recent, seconds(now), dst, etcdKey, data)
	if err != nil || plaintext == nil { // nil: an empty plaintext, and dst is nil
		return nil
	}
	s.p.cfg.Cache.touch(e, old)
	s.p.cfg.Observer.Seed(s.p.cfg.Provider, EventHit)
	return plaintext
}

// open decrypts an object of this provider, if need be with a recovery copy that one of rings
// unwraps. It appends the plaintext to mode.Dst. e is the seed that was used; it is nil if there
// was none.
func (s *seeds) open(ctx context.Context, etcdKey, object []byte, mode Mode, rings []*Ring) (plaintext []byte, e *entry, err *Error) {
	if st := s.p.state.Load(); st.revoked != nil && !kmsclient.ReasonOf(st.revoked).Gone() && !slices.ContainsFunc(rings, (*Ring).overrides) {
		return nil, nil, s.p.errorf(KeyUnusable, st.revoked, "%s", describe(st.revoked))
	}
	e, l, err := s.lookup(object, rings)
	switch {
	case err != nil:
		return nil, nil, err
	case e != nil:
		s.p.cfg.Observer.Seed(s.p.cfg.Provider, l.event)
	case mode.Try:
		return nil, nil, ErrWouldBlock
	default:
		if e, err = s.fetch(ctx, &l, rings); err != nil {
			return nil, nil, err
		}
		s.remember(&l, e)
	}
	verified := e.verified.Load()
	plaintext, oerr := e.seed.OpenRecent(&s.recent, seconds(time.Since(s.begun)), mode.Dst, etcdKey, l.data)
	if oerr != nil {
		if !verified {
			if plaintext, err = s.openAgain(ctx, e, etcdKey, object, mode); err == nil || err.Kind != Corrupt {
				return plaintext, e, err
			}
		}
		return nil, e, s.p.errorf(Corrupt, oerr, "the data does not decrypt under this etcd key and KMS key ID %q: it was changed, truncated or moved here", e.keyID)
	}
	if !verified {
		e.verified.Store(true)
	}
	if e.copyUse != nil {
		s.copies.noteUse(e)
	}
	return plaintext, e, nil
}

// lookup is where an object's seed is found.
type lookup struct {
	data   []byte           // the object's encrypted data
	rest   []byte           // its bytes after that, if they are a key of the hot table; else nil
	header *envelope.Header // nil if the hot table had the seed
	digest digest
	stale  *entry // a cached seed past its TTL
	event  Event  // of the seed that was found
}

// lookup returns the seed of an object that may be used without waiting for a KMS, or nil.
func (s *seeds) lookup(object []byte, rings []*Ring) (e *entry, l lookup, err *Error) {
	data, rest, cut := envelope.Cut(object)
	if cut {
		if e := s.hot.Get(rest); e != nil {
			old := time.Since(e.fetched) // half the cost of time.Now
			if s.p.cfg.Cache.ageAfter(e, old) == fresh {
				s.p.cfg.Cache.touch(e, old)
				return e, lookup{data: data, event: EventHit}, nil
			}
		}
	}
	o, perr := envelope.Parse(object)
	if perr != nil {
		return nil, l, s.p.errorf(Corrupt, perr, "%v", perr)
	}
	l = lookup{data: o.Data, header: &o.Header, digest: digestOf(s.p.cfg.Provider, &o.Header)}
	// Only if Parse found the same data is rest the header and nothing else.
	if cut && len(data) == len(o.Data) && &data[0] == &o.Data[0] {
		l.rest = rest
	}
	if e = s.cached(&l, rings, time.Now()); e != nil {
		s.remember(&l, e)
	}
	return e, l, nil
}

// cached returns a cached seed that may be used without waiting for a KMS, or nil.
func (s *seeds) cached(l *lookup, rings []*Ring, now time.Time) *entry {
	if e := s.p.cfg.Cache.get(l.digest); e != nil {
		switch s.p.cfg.Cache.ageOf(e, now) {
		case fresh:
			l.event = EventHit
			return e
		case stale:
			l.stale = e
		case expired:
		}
	}
	if l.stale == nil {
		l.event = EventHit
		return s.copies.cached(l.digest, l.header, rings, now)
	}
	l.event = EventStale
	if now.UnixNano() < l.stale.retry.Load() {
		return l.stale
	}
	if st := s.p.state.Load(); !st.healthy && st.revoked == nil && s.refusals.current(l.digest) == nil {
		// The KMS did not answer the last health check, so that no caller waits for it. If it
		// answers this call, the seed is renewed.
		s.unwrapping(l.digest, cloneHeader(l.header))
		return l.stale
	}
	return nil
}

// remember puts a seed into the hot table, but for one from a recovery copy: only rules that name
// the copy's provider may use it.
func (s *seeds) remember(l *lookup, e *entry) {
	if l.rest != nil && e.unwrapper == s.ring && e != l.stale {
		s.hot.Put(l.rest, e)
	}
}

func (s *seeds) newEntry(d digest, h *envelope.Header, seed *envelope.Seed) *entry {
	return &entry{
		ring: s.ring, digest: d, seed: seed, typ: h.Type, keyID: h.KeyID, copies: copiesIn(h), fetched: time.Now(),
		unwrapper: s.ring, unwrapperKeyID: h.KeyID, header: keep(h),
	}
}

// evict takes every seed that match accepts out of use, and returns their number.
func (s *seeds) evict(match func(*entry) bool) int {
	n := s.p.cfg.Cache.evictAll(match)
	// The hot table can hold entries that the cache has evicted.
	s.hot.Remove(func(e *entry) bool {
		matches := match(e)
		if matches {
			e.evicted.Store(true)
		}
		return matches
	})
	s.recent.Clear()
	return n
}

// evictUnder evicts the seeds under key IDs that the KMS refuses. Those from recovery copies stay
// if the key is gone, and not if an operator has disabled it.
func (s *seeds) evictUnder(under func(keyID string) bool, cause error) int {
	gone := kmsclient.ReasonOf(cause).Gone()
	return s.evict(func(e *entry) bool {
		return e.unwrapper == s.ring && under(e.unwrapperKeyID) || e.ring == s.ring && under(e.keyID) && !gone && !e.unwrapper.overrides()
	})
}

// evictKeys evicts the seeds under key IDs, after the KMS refused keyID. Those that the KMS still
// unwraps are unwrapped again at their next use.
func (s *seeds) evictKeys(under func(keyID string) bool, keyID string, cause error) {
	if n := s.evictUnder(under, cause); n > 0 {
		s.p.cfg.Observer.Seed(s.p.cfg.Provider, EventRevoked)
		s.p.cfg.Logger.Warn("DEK seeds of a KMS key are evicted", "provider", s.p.cfg.Provider, "keyID", keyID, "reason", describe(cause), "seeds", n)
	}
}

// keep returns a copy of what unwrapping a seed again needs, or nil if it is too large to keep.
func keep(h *envelope.Header) *envelope.Header {
	own := *h
	own.Annotations = h.KMSAnnotations()
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
