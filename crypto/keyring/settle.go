package keyring

import (
	"time"
)

// Limits for key IDs that Status goes back to: see settling.
const (
	// flapMemory is how long a former key ID is remembered.
	flapMemory = 24 * time.Hour
	// flapHold is how long Status must name a former key ID without a break until it is used again.
	flapHold = time.Hour
	maxLeft  = 64 // former key IDs
)

// settling decides whether to follow a key ID that Status goes back to. Each change means a new
// seed, and with re-encryption that every value is written again, so that a KMS that alternates
// between two key IDs must not be followed.
type settling struct {
	left map[string]time.Time // former key IDs, and until when they were in use
	// the former key ID that Status names now; "" if it names the one in use
	back   string
	since  time.Time // when Status began to
	logged time.Time
}

// waits reports whether keyID is a former key ID that is not used again yet.
func (s *settling) waits(keyID string) bool { return s.back != "" && s.back == keyID }

// settle returns the key ID to use now that Status says keyID: that, or the one in use if keyID was
// in use a short time ago.
func (m *monitor) settle(keyID string) string {
	s, now, have := &m.settled, time.Now(), m.p.state.Load().keyID
	if have == "" || keyID == have {
		s.back = ""
		return keyID
	}
	if left, ok := s.left[keyID]; !ok || now.Sub(left) >= flapMemory {
		return m.adopt(keyID)
	}
	if s.back != keyID {
		s.back, s.since = keyID, now
		m.flapped.Store(now.Unix())
		if now.Sub(s.logged) >= flapHold {
			s.logged = now
			m.p.cfg.Logger.Warn("KMS key ID alternates: the one in use is kept until the KMS names another one for an hour; check whether two plugins or key versions serve one name",
				"provider", m.p.cfg.Provider, "keyID", have, "statusKeyID", keyID)
		}
	}
	if now.Sub(s.since) >= flapHold {
		return m.adopt(keyID)
	}
	return have
}

// adopt makes keyID the key ID in use, and returns it.
func (m *monitor) adopt(keyID string) string {
	s := &m.settled
	if have := m.p.state.Load().keyID; have != "" && have != keyID {
		if len(s.left) >= maxLeft {
			clear(s.left)
		}
		s.left[have] = time.Now()
	}
	delete(s.left, keyID)
	s.back = ""
	return keyID
}
