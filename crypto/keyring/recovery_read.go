package keyring

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// copyReader unwraps recovery copies of DEK seeds, for values of a ring whose own KMS does not
// unwrap them.
type copyReader struct {
	ring  *Ring
	p     *provider
	calls *caller
	seeds *seeds

	uses sync.Map // by whose copies values were decrypted: of *Ring, *copyUse
}

// copyUse records that values of a ring are decrypted by copies that another ring unwraps.
type copyUse struct {
	last   atomic.Int64   // when, in Unix seconds
	logged rate.Sometimes // limits how often the log says so
}

// recoveryCopy is a recovery copy that a ring of the rule can unwrap. Its seed is cached under a
// digest of its own, so that rules which do not name that ring do not find it.
type recoveryCopy struct {
	by     *Ring
	digest digest
	header *envelope.Header // nil if the copy is damaged
	broken error            // why
}

// find returns the recovery copies in a header that one of rings can unwrap, in the order of rings.
// They share h's memory.
func (c *copyReader) find(d digest, h *envelope.Header, rings []*Ring) []recoveryCopy {
	var found []recoveryCopy
	for _, by := range rings {
		encoded, ok := c.copyOf(by, h)
		if !ok {
			continue
		}
		s := recoveryCopy{by: by, digest: digestOfCopy(d, by)}
		s.header, s.broken = copyHeader(by, h, encoded)
		found = append(found, s)
	}
	return found
}

// copyHeader returns what unwraps the encoded copy by a ring.
func copyHeader(by *Ring, h *envelope.Header, encoded []byte) (*envelope.Header, error) {
	offline, ok := h.OfflineCopyBy(by.Provider())
	switch {
	case ok && by.IsOffline():
		return &envelope.Header{Type: h.Type, KeyID: offline.Recipients, Source: offline.File}, nil
	case ok:
		return nil, errors.New("the copy is an age file, and the provider has a KMS")
	case by.IsOffline():
		return nil, errors.New("the copy is not an age file, and the provider has no KMS")
	}
	c, err := envelope.ParseCopy(encoded)
	if err != nil {
		return nil, err
	}
	header := c.Header(h.Type)
	return &header, nil
}

// copyOf returns the copy in a header that another ring can unwrap.
func (c *copyReader) copyOf(by *Ring, h *envelope.Header) ([]byte, bool) {
	if by == c.ring || by.p.copyName == "" {
		return nil, false
	}
	encoded, ok := h.Annotations[by.p.copyName]
	return encoded, ok
}

func digestOfCopy(d digest, by *Ring) digest {
	return sha256.Sum256(append(d[:], by.p.copyName...))
}

// cached returns a cached seed from a recovery copy within its TTL, or nil.
func (c *copyReader) cached(d digest, h *envelope.Header, rings []*Ring, now time.Time) *entry {
	for _, by := range rings {
		if _, ok := c.copyOf(by, h); !ok {
			continue
		}
		e := c.p.cfg.Cache.get(digestOfCopy(d, by))
		if e == nil || c.p.cfg.Cache.ageOf(e, now) != fresh {
			continue
		}
		// If the value's own KMS was only unreachable, it is called again while the copy's seed is
		// used.
		if last := e.retry.Load(); last != 0 && now.UnixNano() >= last && c.p.state.Load().healthy &&
			e.retry.CompareAndSwap(last, now.Add(c.p.cfg.PollInterval).UnixNano()) {
			c.seeds.unwrapping(d, cloneHeader(h))
		}
		return e
	}
	return nil
}

// allowed reports whether recovery copies may be used after the value's own KMS failed with err.
// They may if the key is gone, if the KMS is unreachable, and if it does not unwrap what it
// wrapped. They may not if someone has disabled the key or withdrawn the permission: that must
// remain a way to end the use of a key.
func (c *copyReader) allowed(err *Error) bool {
	if errors.Is(err, errStopped) || c.p.isDisabled() {
		return false
	}
	return err.Kind == Unavailable || err.Kind == SeedRefused || err.Kind == Corrupt || kmsclient.ReasonOf(err.Err).Gone()
}

// fetch returns the seed of the first copy that can be unwrapped. first is why the value's own KMS
// did not unwrap it.
func (c *copyReader) fetch(ctx context.Context, h *envelope.Header, found []recoveryCopy, first *Error) (*entry, *Error) {
	if !c.allowed(first) {
		if found = slices.DeleteFunc(found, func(s recoveryCopy) bool { return !s.by.overrides() }); len(found) == 0 || errors.Is(first, errStopped) {
			return nil, notLost(first)
		}
	}
	if ctx.Err() != nil && len(found) > 0 {
		return nil, c.p.errorf(Unavailable, context.Cause(ctx), "the caller canceled before a recovery copy was unwrapped")
	}
	if len(found) == 0 {
		return nil, &Error{Kind: first.Kind, Err: first.Err, Text: first.Text + "; the value holds recovery copies, and the rule names none of their providers: " + providersIn(h)}
	}
	// A failure that may pass counts before one that needs an operator, and that before a permanent
	// one: a value is not lost because of an outage of a recovery provider.
	all := notLost(first)
	all.silent, all.responded = first.Kind == Unavailable && !first.Responded(), first.Responded()
	lost := len(found) == len(copiesIn(h)) // no other copy might be unwrapped
	for _, s := range found {
		e, err := c.seeds.await(ctx, c.seeds.flight(string(s.digest[:]), func() (*entry, *Error) { return c.unwrap(h, s, first) }), "a recovery copy was unwrapped")
		if err == nil {
			return e, nil
		}
		if old := c.p.cfg.Cache.get(s.digest); old != nil && (err.Kind == Unavailable || err.Kind == SeedRefused) && c.p.cfg.Cache.ageOf(old, time.Now()) != expired {
			c.p.cfg.Observer.Seed(c.p.cfg.Provider, EventStale)
			return old, nil
		}
		lost = lost && (err.Kind == Corrupt || err.lost != nil)
		all.Kind = min(all.Kind, err.Kind)
		all.silent = all.silent || err.Kind == Unavailable && !err.Responded()
		all.responded = all.responded || err.Responded()
		all.Text += fmt.Sprintf("; its recovery copy was not used either: %s", err.Text)
	}
	if lost && (first.lost != nil || first.Kind == Corrupt) && all.Kind != Corrupt {
		all.lost = c.p
	}
	return nil, all
}

// providersIn names the providers of a header's copies. Such a name is a part of a domain name.
func providersIn(h *envelope.Header) string {
	var names []string
	for k := range h.Annotations {
		if name, ok := envelope.RecoveryProvider(k); ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return Clip(strings.Join(names, ", "))
}

// unwrap has the copy's KMS unwrap it, and caches the seed.
func (c *copyReader) unwrap(h *envelope.Header, s recoveryCopy, first *Error) (*entry, *Error) {
	old := c.p.cfg.Cache.get(s.digest)
	if old != nil && c.p.cfg.Cache.ageOf(old, time.Now()) == fresh {
		return old, nil // unwrapped since the caller looked it up
	}
	if s.header == nil {
		return nil, s.by.p.errorf(Corrupt, s.broken, "%v", s.broken)
	}
	if revoked := s.by.p.state.Load().revoked; revoked != nil {
		return nil, s.by.p.markLost(s.by.p.errorf(KeyUnusable, revoked, "%s", describe(revoked)), s.header, revoked)
	}
	if last := s.by.refusals.current(s.digest); last != nil {
		return nil, s.by.refusals.failure("copy", s.header, last)
	}
	if !c.calls.begin() {
		return nil, c.p.errorf(Unavailable, errStopped, "the copy was not unwrapped")
	}
	defer c.calls.running.Done()
	gen := s.by.p.revocations()
	ctx, cancel := context.WithCancel(s.by.seeds.attempts(s.digest))
	defer cancel()
	defer context.AfterFunc(c.calls.base, cancel)()
	seed, sum, err := s.by.seeds.secret(ctx, "copy", s.digest, s.header)
	if err != nil {
		return nil, err
	}
	e := c.seeds.newEntry(s.digest, h, seed)
	e.sum = sum
	e.unwrapper, e.unwrapperKeyID, e.header, e.copyUse = s.by, s.header.KeyID, keep(s.header), c.useOf(s.by)
	e.copyReason = first.Text
	if first.Kind == Unavailable || first.Kind == SeedRefused {
		e.retry.Store(time.Now().Add(c.p.cfg.FailingPollInterval).UnixNano())
	}
	if old != nil {
		e.verified.Store(old.verified.Load())
	}
	c.p.cfg.Observer.CopyUnwrapped(c.p.cfg.Provider, s.by.Provider(), s.header.KeyID, first.Text)
	// The entry is cached before revocations are checked: one of either key is before the check,
	// and seen, or after it, and evicts the entry.
	c.p.cfg.Cache.put(e)
	if s.by.p.revocations() != gen || c.p.isDisabled() && !s.by.overrides() {
		c.p.cfg.Cache.evict(e)
		return nil, c.p.errorf(Unavailable, nil, "the key's state changed while a recovery copy was unwrapped")
	}
	return e, nil
}

// useOf returns the record of the use of copies that a ring unwraps.
func (c *copyReader) useOf(by *Ring) *copyUse {
	use, _ := c.uses.LoadOrStore(by, &copyUse{logged: rate.Sometimes{Interval: time.Hour}})
	return use.(*copyUse) // nothing else is stored
}

// noteUse logs as an error that a value was decrypted with a seed from a recovery copy.
func (c *copyReader) noteUse(e *entry) {
	c.p.cfg.Observer.Recovered(c.p.cfg.Provider, e.unwrapper.p.cfg.Provider)
	s := time.Now().Unix()
	if e.copyUse.last.Load() == s {
		return // once a second is enough for what follows
	}
	e.copyUse.last.Store(s)
	e.copyUse.logged.Do(func() {
		c.p.cfg.Logger.Error("values are decrypted by recovery copies of their DEK seeds; if the key is gone for good, move their rule to another provider and re-encrypt them",
			"provider", c.p.cfg.Provider, "recoveryProvider", e.unwrapper.p.cfg.Provider, "reason", e.copyReason)
	})
}
