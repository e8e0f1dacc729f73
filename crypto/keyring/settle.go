package keyring

import "time"

const (
	// flapMemory is how long a key ID that the provider has left counts as one that it may be
	// flapping with.
	flapMemory = 24 * time.Hour
	// flapHold is how long a KMS must name such a key ID without a break for it to be used again.
	flapHold = time.Hour
	maxLeft  = 64 // key IDs that are remembered
)

// settling is what is known of the key IDs that Status has named. Each new one means a new seed,
// and all values encrypted again where somebody does that, so that a KMS that goes back and forth
// between two must not be followed.
type settling struct {
	left   map[string]time.Time // when the provider left a key ID
	back   string               // one of these that Status names now; "" if it names the one in use
	since  time.Time            // when it began to
	logged time.Time
}

// waits reports whether Status has named keyID before, and it is not used yet.
func (s *settling) waits(keyID string) bool { return s.back != "" && s.back == keyID }

// settle returns the key ID to use now that Status says keyID: that, or, if it was left a short
// time ago, the one in use.
func (r *Ring) settle(keyID string) string {
	s, now, have := &r.loop.settled, time.Now(), r.state.Load().keyID
	if have == "" || keyID == have {
		s.back = ""
		return keyID
	}
	if left, ok := s.left[keyID]; !ok || now.Sub(left) >= flapMemory {
		return r.adopt(keyID)
	}
	if s.back != keyID {
		s.back, s.since = keyID, now
		r.flapped.Store(now.Unix())
		if now.Sub(s.logged) >= flapHold {
			s.logged = now
			r.cfg.Logger.Warn("KMS key ID goes back and forth: the one in use is kept until the KMS names another for an hour; look for two plugins or versions behind one name",
				"provider", r.cfg.Provider, "keyID", have, "statusKeyID", keyID)
		}
	}
	if now.Sub(s.since) >= flapHold {
		return r.adopt(keyID)
	}
	return have
}

// adopt makes keyID the one to use, and returns it.
func (r *Ring) adopt(keyID string) string {
	s := &r.loop.settled
	if have := r.state.Load().keyID; have != "" && have != keyID {
		if len(s.left) >= maxLeft {
			clear(s.left)
		}
		s.left[have] = time.Now()
	}
	delete(s.left, keyID)
	s.back = ""
	return keyID
}
