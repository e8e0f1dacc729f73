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
	Healthy  bool      // the last contact with the KMS was good
	CanSeal  bool      // values can be sealed now; a ring may be healthy and not writing, or silent and still sealing
	Revoked  bool      // the KMS key may not be used
	KeyID    string    // the current KMS key, as Status said last; "" before
	SealedBy string    // the key ID in the values sealed now; "" when there is no seed
	Reason   string    // why it is not healthy; safe to show
	LastGood time.Time // the last good contact; zero before
	Minted   time.Time // when the current seed was minted; zero when there is none
	Flapped  time.Time // when Status last went back to a key ID that it had left within a day; zero if it never did
}

// State returns what is known now, without asking the KMS.
func (r *Ring) State() State {
	st := r.state.Load()
	s := State{
		Provider: r.cfg.Provider, Healthy: st.healthy, CanSeal: r.maySeal(st), Revoked: st.revoked != nil,
		KeyID: st.keyID, LastGood: st.lastGood,
	}
	if at := r.flapped.Load(); at != 0 {
		s.Flapped = time.Unix(at, 0)
	}
	if st.writer != nil {
		s.SealedBy, s.Minted = st.writer.keyID, st.writer.minted
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

// RecoveryState is what is known of one recovery provider of a ring.
type RecoveryState struct {
	Provider string    // the recovery provider
	Required bool      // nothing is sealed without its copy
	Lacking  string    // why the current seed has no copy of it, or why there is no seed for the want of one; "" otherwise
	Used     time.Time // when a value was last opened by its copies; zero if none was, to the second
}

// Recovery returns the recovery providers of the ring, and those whose copies were used although they are none of them any more.
func (r *Ring) Recovery() []RecoveryState {
	set, st := r.recovery.Load(), r.state.Load()
	w := st.writer
	wanting, _ := errors.AsType[*recoveryError](st.err)
	var states []RecoveryState
	for _, by := range set.rings {
		s := RecoveryState{Provider: by.Provider(), Required: set.required}
		switch {
		case w == nil && wanting != nil && wanting.provider == by.Provider():
			s.Lacking = describe(wanting.cause)
		case w != nil && w.copyBy(by) == nil:
			s.Lacking = "the seed in use is from before it was named"
			if i := slices.IndexFunc(w.lacking, func(l lack) bool { return l.by == by }); i >= 0 {
				s.Lacking = w.lacking[i].why
			}
		}
		states = append(states, s)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for by, u := range r.rescues {
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
