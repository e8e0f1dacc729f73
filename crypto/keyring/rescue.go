package keyring

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// rescueNotice is how often the log says that values are opened by recovery copies.
const rescueNotice = time.Hour

// rescue is that values of a ring are opened by the copies of another one.
type rescue struct {
	last   atomic.Int64 // when, in Unix seconds
	logged atomic.Int64 // when the log said so
}

// spare is a recovery copy that a ring of the rule can unwrap. Its seed is cached under a digest of its own, so that a rule which does not
// name the ring does not find it.
type spare struct {
	by     *Ring
	digest digest
	header *envelope.Header // nil if the copy is damaged
	broken error            // why
}

// spares returns the recovery copies in a header that one of rings can unwrap, in the order of rings. They share h's memory.
func (r *Ring) spares(d digest, h *envelope.Header, rings []*Ring) []spare {
	var found []spare
	for _, by := range rings {
		encoded, ok := r.copyBy(by, h)
		if !ok {
			continue
		}
		s := spare{by: by, digest: digestOfCopy(d, by)}
		if c, err := envelope.ParseCopy(encoded); err != nil {
			s.broken = err
		} else {
			header := c.Header(h.Type)
			s.header = &header
		}
		found = append(found, s)
	}
	return found
}

// copyBy returns the copy in a header that a ring can unwrap. A copy by the ring of the value itself is none.
func (r *Ring) copyBy(by *Ring, h *envelope.Header) ([]byte, bool) {
	if by == r || by.copyName == "" {
		return nil, false
	}
	encoded, ok := h.Annotations[by.copyName]
	return encoded, ok
}

func digestOfCopy(d digest, by *Ring) digest {
	return sha256.Sum256(append(d[:], by.copyName...))
}

// cachedSpare returns a seed that a copy gave within the TTL, or nil.
func (r *Ring) cachedSpare(d digest, h *envelope.Header, rings []*Ring, now time.Time) *entry {
	for _, by := range rings {
		if _, ok := r.copyBy(by, h); !ok {
			continue
		}
		e := r.cfg.Cache.get(digestOfCopy(d, by))
		if e == nil || r.cfg.Cache.ageOf(e, now) != fresh {
			continue
		}
		// A KMS that was only unreachable is asked again, while the copy's seed serves.
		if last := e.retry.Load(); last != 0 && now.UnixNano() >= last && r.state.Load().healthy &&
			e.retry.CompareAndSwap(last, now.Add(r.cfg.PollInterval).UnixNano()) {
			r.flight(d, cloneHeader(h))
		}
		return e
	}
	return nil
}

// mayRescue reports whether recovery copies may stand in for a KMS that has failed with err. They may when the key is gone, when the KMS
// cannot be reached, and when it does not know what it wrapped. They may not when somebody has said no, by disabling the key or by taking
// the permission away: that has to stay a way to end the use of a key.
func (r *Ring) mayRescue(err *Error) bool {
	if errors.Is(err, errStopped) || r.isRefused() {
		return false
	}
	return err.Kind == Unavailable || err.Kind == SeedRefused || err.Kind == Corrupt || kmsclient.ReasonOf(err.Err).Gone()
}

// isRefused reports whether the key is revoked by somebody's will.
func (r *Ring) isRefused() bool {
	revoked := r.state.Load().revoked
	return revoked != nil && !kmsclient.ReasonOf(revoked).Gone()
}

// rescueSeed returns the seed of the first copy that unwraps. first is why the KMS of the value's own provider did not give it.
func (r *Ring) rescueSeed(ctx context.Context, h *envelope.Header, spares []spare, first *Error) (*entry, *Error) {
	if !r.mayRescue(first) {
		return nil, notLost(first)
	}
	if ctx.Err() != nil && len(spares) > 0 {
		return nil, r.errorf(Unavailable, context.Cause(ctx), "the caller went away before a recovery copy was unwrapped")
	}
	if len(spares) == 0 {
		return nil, &Error{Kind: first.Kind, Err: first.Err, Text: first.Text + "; the value holds recovery copies, and the rule names none of their providers: " + providersIn(h)}
	}
	// What may pass counts before what needs an operator, and that before what stays: an outage of a recovery provider is no reason to take a
	// value for lost.
	all := notLost(first)
	all.silent, all.answered = first.Kind == Unavailable && !first.Answered(), first.Answered()
	lost := len(spares) == len(copiesIn(h)) // there is no other copy that might open it
	for _, s := range spares {
		e, err := r.rescueBy(ctx, h, s, first)
		if err == nil {
			return e, nil
		}
		if old := r.cfg.Cache.get(s.digest); old != nil && (err.Kind == Unavailable || err.Kind == SeedRefused) && r.cfg.Cache.ageOf(old, time.Now()) != expired {
			r.cfg.Observer.Seed(r.cfg.Provider, EventStale)
			return old, nil
		}
		lost = lost && (err.Kind == Corrupt || err.lost != nil)
		all.Kind = min(all.Kind, err.Kind)
		all.silent = all.silent || err.Kind == Unavailable && !err.Answered()
		all.answered = all.answered || err.Answered()
		all.Text += fmt.Sprintf("; nor is there a seed from its recovery copy: %s", err.Text)
	}
	if lost && (first.lost != nil || first.Kind == Corrupt) && all.Kind != Corrupt {
		all.lost = r
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
	return clip(strings.Join(names, ", "))
}

// rescueBy is one call for all who want a copy at a time.
func (r *Ring) rescueBy(ctx context.Context, h *envelope.Header, s spare, first *Error) (*entry, *Error) {
	answer := r.flights.DoChan(string(s.digest[:]), func() (any, error) {
		e, err := r.unwrapSpare(h, s, first)
		if err != nil {
			return nil, err
		}
		return e, nil
	})
	select {
	case <-ctx.Done():
		return nil, r.errorf(Unavailable, context.Cause(ctx), "the caller went away while a recovery copy was unwrapped")
	case a := <-answer:
		if a.Err == nil {
			return a.Val.(*entry), nil
		}
		err, ok := errors.AsType[*Error](a.Err)
		if !ok {
			err = s.by.errorf(Unavailable, a.Err, "the copy was not unwrapped")
		}
		return nil, err
	}
}

// unwrapSpare asks the copy's KMS.
func (r *Ring) unwrapSpare(h *envelope.Header, s spare, first *Error) (*entry, error) {
	old := r.cfg.Cache.get(s.digest)
	if old != nil && r.cfg.Cache.ageOf(old, time.Now()) == fresh {
		return old, nil // unwrapped between the caller's look and this call
	}
	if s.header == nil {
		return nil, s.by.errorf(Corrupt, s.broken, "%v", s.broken)
	}
	if revoked := s.by.state.Load().revoked; revoked != nil {
		return nil, s.by.markLost(s.by.errorf(KeyUnusable, revoked, "%s", describe(revoked)), s.header, revoked)
	}
	if known := s.by.refused(s.digest); known != nil {
		return nil, s.by.notUnwrapped("copy", s.header, known)
	}
	if !r.begin() {
		return nil, r.errorf(Unavailable, errStopped, "the copy was not unwrapped")
	}
	defer r.calls.Done()
	gen := s.by.generation()
	ctx, cancel := context.WithCancel(s.by.attempts(s.digest))
	defer cancel()
	defer context.AfterFunc(r.base, cancel)()
	plain, err := s.by.decrypt(expectSeed(ctx, h.Type), s.header)
	if err != nil {
		return nil, s.by.notUnwrapped("copy", s.header, s.by.noteRefusal(s.digest, err))
	}
	seed, err := envelope.NewSeed(h.Type, plain)
	if err != nil {
		return nil, s.by.notUnwrapped("copy", s.header, s.by.noteRefusal(s.digest, &contractError{op: "Decrypt", what: err.Error()}))
	}
	s.by.refusals.Remove(s.digest)
	e := r.newEntry(s.digest, h, seed)
	e.sum = sha256.Sum256(plain)
	e.by, e.byKeyID, e.header, e.rescue = s.by, s.header.KeyID, keep(s.header), r.rescuedBy(s.by)
	e.why = first.Text
	if first.Kind == Unavailable || first.Kind == SeedRefused {
		e.retry.Store(time.Now().Add(r.cfg.FailingPollInterval).UnixNano())
	}
	if old != nil {
		e.proven.Store(old.proven.Load())
	}
	r.cfg.Observer.Rescued(r.cfg.Provider, s.by.Provider(), s.header.KeyID, first.Text)
	// First the entry, then the look: a revocation of either key comes before the look, and is seen, or after, and drops the entry.
	r.cfg.Cache.put(e)
	if s.by.generation() != gen || r.isRefused() {
		r.cfg.Cache.drop(e)
		return nil, r.errorf(Unavailable, nil, "the key's state changed while a recovery copy was unwrapped")
	}
	return e, nil
}

func (r *Ring) rescuedBy(by *Ring) *rescue {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.rescues[by] == nil {
		r.rescues[by] = new(rescue)
	}
	return r.rescues[by]
}

// noteRescue says, loudly, that a value was opened with a seed from a copy.
func (r *Ring) noteRescue(e *entry, now time.Time) {
	r.cfg.Observer.Recovered(r.cfg.Provider, e.by.cfg.Provider)
	if s := now.Unix(); e.rescue.last.Load() != s {
		e.rescue.last.Store(s)
	}
	last := e.rescue.logged.Load()
	if last != 0 && now.Sub(time.Unix(last, 0)) < rescueNotice || !e.rescue.logged.CompareAndSwap(last, now.Unix()) {
		return
	}
	r.cfg.Logger.Error("values are opened by recovery copies of their seeds; if the key is gone for good, move their rule to another provider and rewrite them",
		"provider", r.cfg.Provider, "recoveryProvider", e.by.cfg.Provider, "reason", e.why)
}

// generation counts revocations.
func (r *Ring) generation() uint64 {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.gen
}

// begin announces a call, unless the ring has stopped. The caller ends it with calls.Done.
func (r *Ring) begin() bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.stopped {
		return false
	}
	r.calls.Add(1)
	return true
}
