package keyring

import (
	"errors"
	"slices"
	"strings"
	"time"
)

// State is what health reports and metrics show of a ring.
type State struct {
	Provider string
	Healthy  bool // the last health check was good
	// values can be encrypted now, which may be so although the last health check failed
	CanSeal    bool
	SealReason string    // why not; safe to show
	Revoked    bool      // the KMS key may not be used
	KeyID      string    // the current KMS key, from the last Status; "" before
	SealedBy   string    // the key ID in values that are encrypted now; "" when there is no seed
	Reason     string    // why the last health check failed; safe to show
	LastGood   time.Time // when the last good health check ended; zero before
	Seeded     time.Time // when the seed in use was generated; zero when there is none
	// when Status last went back to a key ID that was in use within a day; zero if it never did
	Flapped time.Time
}

// State returns the result of the last health check. It makes no KMS call.
func (r *Ring) State() State {
	st := r.p.state.Load()
	s := State{
		Provider: r.p.cfg.Provider, Healthy: st.healthy, CanSeal: r.maySeal(st), Revoked: st.revoked != nil,
		KeyID: st.keyID, LastGood: st.lastGood,
	}
	if !s.CanSeal {
		s.SealReason = r.cannotSeal(st).Text
	}
	if at := r.monitor.flapped.Load(); at != 0 {
		s.Flapped = time.Unix(at, 0)
	}
	if st.writer != nil {
		s.SealedBy, s.Seeded = st.writer.keyID, st.writer.generated
	}
	switch {
	case st.revoked != nil:
		s.Reason = describe(st.revoked)
	case st.err != nil:
		s.Reason = describe(st.err)
	case !st.healthy:
		s.Reason = "the KMS has not answered yet"
	}
	return s
}

// RecoveryState is the state of one recovery provider of a ring.
type RecoveryState struct {
	Provider string // the recovery provider
	Required bool   // no value is encrypted without its copy
	Lacking  string // why the seed in use, or the next one, has no copy by it; "" if it has one
	// when a value was last decrypted by one of its copies, to the second; zero if none was
	Used time.Time
}

// Recovery returns the recovery providers of the ring, and former ones whose copies were used.
func (r *Ring) Recovery() []RecoveryState {
	set, st := r.copier.set.Load(), r.p.state.Load()
	w := st.writer
	wanting, _ := errors.AsType[*recoveryError](st.err)
	var states []RecoveryState
	for _, by := range set.rings {
		s := RecoveryState{Provider: by.Provider(), Required: set.required}
		switch {
		case w == nil && wanting != nil && wanting.provider == by.Provider():
			s.Lacking = describe(wanting.cause)
		case w != nil && w.copyBy(by) == nil:
			s.Lacking = "the DEK seed in use is older than the setting"
			if i := slices.IndexFunc(w.lacking, func(l missingCopy) bool { return l.by == by }); i >= 0 {
				s.Lacking = w.lacking[i].why
			}
		}
		states = append(states, s)
	}
	for by, u := range r.copies.uses.Range {
		by, u := by.(*Ring), u.(*copyUse) // nothing else is stored
		i := slices.IndexFunc(states, func(s RecoveryState) bool { return s.Provider == by.Provider() })
		if i < 0 {
			i, states = len(states), append(states, RecoveryState{Provider: by.Provider()})
		}
		if last := u.last.Load(); last != 0 {
			states[i].Used = time.Unix(last, 0)
		}
	}
	slices.SortFunc(states, func(a, b RecoveryState) int { return strings.Compare(a.Provider, b.Provider) })
	return states
}

// ValueState compares a stored value with what its rule writes.
type ValueState string

// The states. A stale value is decrypted by a recovery copy, or is of another key ID, provider,
// type, format or set of recovery copies than a new one.
const (
	Current ValueState = "current" // as the rule writes it now
	Stale   ValueState = "stale"   // encrypted, but not as the rule writes it now
	// Unencrypted: plaintext; if the rule writes plaintext, that is Current
	Unencrypted ValueState = "plaintext"
	// Foreign: encrypted by a provider that the rule does not read
	Foreign       ValueState = "foreign"
	Undecryptable ValueState = "undecryptable" // cannot be decrypted; the error says why
)
