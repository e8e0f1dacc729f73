package keyring

import (
	"bytes"
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

// recovery is who wraps copies of a ring's seeds. It does not change.
type recovery struct {
	rings    []*Ring
	required bool
}

// copyID is what identifies a recovery copy in a value.
type copyID struct {
	provider string
	keyID    string // as the KMS answered; "" if the copy is damaged
	statusID string // what Status had said by then; of a writer only
}

// lack is a recovery provider that did not wrap a seed, and why.
type lack struct {
	by  *Ring
	why string
}

// SetRecovery has each seed that is minted from now on wrapped by the KMS of every one of rings too, and mints one at the next contact if that
// differs from before. If required, nothing is sealed under a seed without all of these copies; otherwise it is sealed with what there is, [Ring.State]
// names what is lacking, and a new seed is minted once the provider wraps again. It may be called at any time. rings is not retained.
func (r *Ring) SetRecovery(rings []*Ring, required bool) error {
	for i, by := range rings {
		var err error
		switch {
		case by == r:
			err = errors.New("the provider is no recovery of itself")
		case slices.Contains(rings[:i], by):
			err = fmt.Errorf("provider %q is there twice", by.Provider())
		case by.copyName == "":
			_, err = envelope.RecoveryAnnotation(by.Provider())
		}
		if err != nil {
			return fmt.Errorf("set recovery of provider %q: %w", r.Provider(), err)
		}
	}
	required = required && len(rings) > 0
	if now := r.recovery.Load(); now.required == required && slices.Equal(now.rings, rings) {
		return nil
	}
	next := &recovery{rings: slices.Clone(rings), required: required}
	r.update(func(st *state) {
		r.recovery.Store(next)
		// Values to seal wait for the contact that mints a seed with the copies; after the ring has ended there is none.
		if st.writer != nil && st.writer.missing(next) != nil && st.pending == nil && !r.stopped {
			st.pending = make(chan struct{})
		}
	})
	r.poke()
	return nil
}

// missing returns a recovery provider without whose copy nothing may be sealed under w by now, or nil: a seed from before a reload may lack it.
func (w *writer) missing(now *recovery) *Ring {
	if w.recovery == now || !now.required {
		return nil // it was minted for this, or nothing is required
	}
	for _, by := range now.rings {
		if w.copyBy(by) == nil {
			return by
		}
	}
	return nil
}

// copyBy returns the copy that a recovery provider has made of the seed, or nil.
func (w *writer) copyBy(by *Ring) *copyID {
	i := slices.IndexFunc(w.copies, func(c copyID) bool { return c.provider == by.Provider() })
	if i < 0 {
		return nil
	}
	return &w.copies[i]
}

// mayMint returns why no seed can be minted, if that is known without asking. It spares the ring's own KMS a seed for each contact.
func (s *recovery) mayMint() error {
	if !s.required {
		return nil
	}
	for _, by := range s.rings {
		if err := by.state.Load().kmsError(); err != nil {
			return &recoveryError{provider: by.Provider(), cause: err}
		}
	}
	return nil
}

// copySeed has every recovery provider wrap the seed, all at a time, and adds the copies to its header.
func (w *writer) copySeed(ctx context.Context, h *envelope.Header, seed []byte) error {
	rings := w.recovery.rings
	if len(rings) == 0 {
		return nil
	}
	type answer struct {
		id      copyID
		encoded []byte
		err     error
	}
	answers := make([]answer, len(rings))
	var all sync.WaitGroup
	for i, by := range rings {
		all.Go(func() {
			a := &answers[i]
			a.id, a.encoded, a.err = by.wrap(ctx, seed)
		})
	}
	all.Wait()
	if ctx.Err() != nil {
		return ctx.Err() // ended from this side: no provider is to blame
	}
	h.Annotations = maps.Clone(h.Annotations)
	if h.Annotations == nil {
		h.Annotations = make(map[string][]byte, len(rings))
	}
	for i, by := range rings {
		a := &answers[i]
		if a.err == nil {
			h.Annotations[by.copyName] = a.encoded
			if err := h.Validate(); err != nil {
				delete(h.Annotations, by.copyName)
				a.err = &contractError{op: "Encrypt", what: err.Error()}
			}
		}
		switch {
		case a.err == nil:
			w.copies = append(w.copies, a.id)
		case w.recovery.required:
			return &recoveryError{provider: by.Provider(), cause: a.err}
		default:
			w.lacking = append(w.lacking, lack{by: by, why: describe(a.err)})
		}
	}
	return nil
}

// wrap has the ring's KMS wrap another ring's seed. A provider whose last contact was not good is not asked: whoever waits for the seed
// would wait for that as well.
func (r *Ring) wrap(ctx context.Context, seed []byte) (copyID, []byte, error) {
	st := r.state.Load()
	if err := st.kmsError(); err != nil {
		return copyID{}, nil, err
	}
	if !r.begin() {
		return copyID{}, nil, errStopped
	}
	defer r.calls.Done()
	ctx, cancel := context.WithTimeout(ctx, r.cfg.Timeout)
	defer cancel()
	defer context.AfterFunc(r.base, cancel)()
	answer, err := r.cfg.KMS.Encrypt(ctx, newUID(), bytes.Clone(seed))
	switch {
	case err != nil:
		if refuses(err) {
			r.doubt()
		}
		return copyID{}, nil, fmt.Errorf("wrap recovery copy: %w", err)
	case answer == nil:
		return copyID{}, nil, &contractError{op: "Encrypt", what: "there is no answer"}
	case bytes.Contains(answer.Ciphertext, seed):
		return copyID{}, nil, &contractError{op: "Encrypt", what: "the wrapped data key holds the data key itself"}
	}
	c := envelope.Copy{KeyID: answer.KeyID, Source: answer.Ciphertext, Annotations: answer.Annotations}
	encoded, err := c.Append(nil)
	if err != nil {
		return copyID{}, nil, &contractError{op: "Encrypt", what: err.Error()}
	}
	id := copyID{provider: r.cfg.Provider, keyID: c.KeyID, statusID: st.keyID}
	if id.statusID == "" {
		id.statusID = c.KeyID
	}
	return id, encoded, nil
}

// kmsError returns why the last contact was not good, unless it is for the want of a recovery copy: two rings that copy each other's seeds would
// otherwise wait for each other.
func (st *state) kmsError() error {
	if _, ok := errors.AsType[*recoveryError](st.err); ok {
		return nil
	}
	return st.err
}

// copiesDue reports whether a new seed would have better copies than the current one.
func (r *Ring) copiesDue(ctx context.Context, w *writer) bool {
	if w.recovery != r.recovery.Load() {
		return true
	}
	for _, by := range w.recovery.rings {
		st := by.state.Load()
		if st.kmsError() != nil || st.keyID == "" {
			continue
		}
		if c := w.copyBy(by); c != nil {
			if st.keyID != c.keyID && st.keyID != c.statusID {
				return true // the recovery provider has a new key
			}
			continue
		}
		// A provider that is healthy and does not wrap costs a call of its own each time, and not a new seed.
		trial := make([]byte, envelope.SeedSize)
		_, _ = rand.Read(trial) // does not fail: crypto/rand ends the process instead
		if _, _, err := by.wrap(ctx, trial); err == nil {
			return true
		}
	}
	return false
}

// logLacking tells of a new seed's copies that are lacking, and of their end, once each.
func (r *Ring) logLacking(w *writer) {
	var before []lack
	if was := r.state.Load().writer; was != nil {
		before = was.lacking
	}
	has := func(ls []lack, by *Ring) bool {
		return slices.ContainsFunc(ls, func(l lack) bool { return l.by == by })
	}
	for _, l := range w.lacking {
		if !has(before, l.by) {
			r.cfg.Logger.Error("values are sealed without a recovery copy of their seed", "provider", r.cfg.Provider, "recoveryProvider", l.by.Provider(), "reason", l.why)
		}
	}
	for _, l := range before {
		if !has(w.lacking, l.by) {
			r.cfg.Logger.Info("values are sealed with every recovery copy again", "provider", r.cfg.Provider, "recoveryProvider", l.by.Provider())
		}
	}
}

// copiesCurrent reports whether a value's copies are those that the ring makes now, by provider and key ID.
func (r *Ring) copiesCurrent(have []copyID) bool {
	rings := r.recovery.Load().rings
	if len(have) != len(rings) {
		return false
	}
	for _, by := range rings {
		i := slices.IndexFunc(have, func(c copyID) bool { return c.provider == by.Provider() })
		if i < 0 || have[i].keyID == "" {
			return false
		}
		if want := r.copyKeyID(by); want != "" && want != have[i].keyID {
			return false
		}
	}
	return true
}

// copyKeyID returns the key ID that copies by a recovery provider have now, or "" if it is not known.
func (r *Ring) copyKeyID(by *Ring) string {
	if w := r.state.Load().writer; w != nil {
		if c := w.copyBy(by); c != nil {
			return c.keyID
		}
	}
	return by.state.Load().keyID
}

// copiesIn lists the recovery copies of a header, the damaged ones without a key ID.
func copiesIn(h *envelope.Header) []copyID {
	var ids []copyID
	for k, v := range h.Annotations {
		if provider, ok := envelope.RecoveryProvider(k); ok {
			c, _ := envelope.ParseCopy(v)
			ids = append(ids, copyID{provider: provider, keyID: c.KeyID})
		}
	}
	return ids
}
