package keyring

import (
	"context"
	"crypto/rand"
	"maps"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

// copyWriter has recovery copies of a ring's new DEK seeds wrapped.
type copyWriter struct {
	p   *provider
	set atomic.Pointer[copySet]
}

// copySet is the rings that wrap copies. It does not change.
type copySet struct {
	rings    []*Ring
	required bool
}

// copyID is what identifies a recovery copy in a value.
type copyID struct {
	provider string
	keyID    string // from the KMS' response; "" if the copy is damaged
	statusID string // from the last Status before; of a writer only
}

// missingCopy is a recovery provider that did not wrap a seed, and the reason.
type missingCopy struct {
	by  *Ring
	why string
}

// mayGenerate returns why no seed can be generated, as far as the last health checks say. It saves
// the ring's own KMS a call in each health check.
func (s *copySet) mayGenerate() error {
	if !s.required {
		return nil
	}
	for _, by := range s.rings {
		if err := by.p.state.Load().kmsError(); err != nil {
			return &recoveryError{provider: by.Provider(), cause: err}
		}
	}
	return nil
}

// missing returns a required recovery provider whose copy w does not have, or nil. Values must not
// be encrypted with w then: it is from before a reload.
func (w *writer) missing(now *copySet) *Ring {
	if w.recovery == now || !now.required {
		return nil // it was generated for now, or nothing is required
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

// copySeed has all recovery providers wrap the seed at the same time, and adds the copies to its
// header.
func (w *writer) copySeed(ctx context.Context, h *envelope.Header, seed []byte) error {
	rings := w.recovery.rings
	if len(rings) == 0 {
		return nil
	}
	type result struct {
		id          copyID
		annotations map[string][]byte
		err         error
	}
	results := make([]result, len(rings))
	var all sync.WaitGroup
	for i, by := range rings {
		all.Go(func() {
			a := &results[i]
			a.id, a.annotations, a.err = by.calls.wrapCopy(ctx, seed)
		})
	}
	all.Wait()
	if ctx.Err() != nil {
		return ctx.Err() // canceled here: this says nothing about a provider
	}
	h.Annotations = maps.Clone(h.Annotations)
	if h.Annotations == nil {
		h.Annotations = make(map[string][]byte, len(rings))
	}
	for i, by := range rings {
		a := &results[i]
		if a.err == nil {
			maps.Copy(h.Annotations, a.annotations)
			if err := h.Validate(); err != nil {
				maps.DeleteFunc(h.Annotations, func(k string, _ []byte) bool { return a.annotations[k] != nil })
				a.err = brokenContract("Encrypt", err.Error())
			}
		}
		switch {
		case a.err == nil:
			w.copies = append(w.copies, a.id)
		case w.recovery.required:
			return &recoveryError{provider: by.Provider(), cause: a.err}
		default:
			w.lacking = append(w.lacking, missingCopy{by: by, why: describe(a.err)})
		}
	}
	return nil
}

// due reports whether a new seed would have better copies than w.
func (cw *copyWriter) due(ctx context.Context, w *writer) bool {
	if w.recovery != cw.set.Load() {
		return true
	}
	for _, by := range w.recovery.rings {
		st := by.p.state.Load()
		if st.kmsError() != nil || st.keyID == "" {
			continue
		}
		if c := w.copyBy(by); c != nil {
			if st.keyID != c.keyID && st.keyID != c.statusID {
				return true // the recovery provider has a new key
			}
			continue
		}
		// A healthy provider that did not wrap is tried with a seed of no use first, so that its
		// failure costs no new seed.
		trial := make([]byte, envelope.SeedSize)
		_, _ = rand.Read(trial) // does not fail: crypto/rand ends the process instead
		if _, _, err := by.calls.wrapCopy(ctx, trial); err == nil {
			return true
		}
	}
	return false
}

// logLacking logs which copies a new seed lacks, and which it has again, once each.
func (cw *copyWriter) logLacking(w *writer) {
	var before []missingCopy
	if was := cw.p.state.Load().writer; was != nil {
		before = was.lacking
	}
	has := func(ls []missingCopy, by *Ring) bool {
		return slices.ContainsFunc(ls, func(l missingCopy) bool { return l.by == by })
	}
	for _, l := range w.lacking {
		if !has(before, l.by) {
			cw.p.cfg.Logger.Error("values are encrypted without a recovery copy of their DEK seed", "provider", cw.p.cfg.Provider, "recoveryProvider", l.by.Provider(), "reason", l.why)
		}
	}
	for _, l := range before {
		if !has(w.lacking, l.by) {
			cw.p.cfg.Logger.Info("values are encrypted with every recovery copy again", "provider", cw.p.cfg.Provider, "recoveryProvider", l.by.Provider())
		}
	}
}

// current reports whether a value's copies are those of a new value, by provider and key ID.
func (cw *copyWriter) current(have []copyID) bool {
	rings := cw.set.Load().rings
	if len(have) != len(rings) {
		return false
	}
	for _, by := range rings {
		i := slices.IndexFunc(have, func(c copyID) bool { return c.provider == by.Provider() })
		if i < 0 || have[i].keyID == "" {
			return false
		}
		if want := cw.keyIDBy(by); want != "" && want != have[i].keyID {
			return false
		}
	}
	return true
}

// keyIDBy returns the key ID that copies by a recovery provider have now, or "" if there is none
// yet.
func (cw *copyWriter) keyIDBy(by *Ring) string {
	if w := cw.p.state.Load().writer; w != nil {
		if c := w.copyBy(by); c != nil {
			return c.keyID
		}
	}
	return by.p.state.Load().keyID
}

// copiesIn returns the recovery copies in a header, the damaged ones without a key ID.
func copiesIn(h *envelope.Header) []copyID {
	var ids []copyID
	for k, v := range h.Annotations {
		if provider, ok := envelope.RecoveryProvider(k); ok {
			if c, ok := h.OfflineCopyBy(provider); ok {
				ids = append(ids, copyID{provider: provider, keyID: c.Recipients})
				continue
			}
			c, _ := envelope.ParseCopy(v)
			ids = append(ids, copyID{provider: provider, keyID: c.KeyID})
		}
	}
	return ids
}
