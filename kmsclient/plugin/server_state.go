package plugin

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	mathrand "math/rand/v2"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

const (
	pokeSpacing = time.Second // between contacts that calls asked for
	maxVerify   = time.Hour
)

// known is what the server knows of its key.
type known struct {
	keyID    string    // what Encrypt answers, as far as is known; "" before the first good contact
	statusID string    // what the KMS' own Status said last
	err      error     // of the last contact; nil if it was good
	lastGood time.Time // when the last good contact ended
	changes  int       // of keyID, so that an answer from before a change does not undo it
}

// verification is when Encrypt is tried next, while it answers another key ID than Status.
type verification struct {
	after time.Duration
	at    time.Time
}

// ServerState is a server's state, for metrics and health.
type ServerState struct {
	Provider string
	KeyID    string    // what Status names; "" before the first good contact
	Healthy  bool      // whether the last contact was good
	Reason   string    // why not; holds nothing secret
	LastGood time.Time // zero before the first good contact
}

// State returns the server's state. It is safe for concurrent use and costs no KMS call.
func (s *Server) State() ServerState {
	k := s.look()
	st := ServerState{Provider: s.cfg.Provider, KeyID: k.keyID, Healthy: k.err == nil && k.keyID != "", LastGood: k.lastGood}
	switch {
	case k.err != nil:
		st.Reason = k.err.Error()
	case !st.Healthy:
		st.Reason = "the KMS has not answered yet"
	}
	return st
}

func (s *Server) look() known {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.known
}

// poll keeps what is known true until ctx ends.
func (s *Server) poll(ctx context.Context) {
	for first := true; ; first = false {
		s.contact(ctx)
		if ctx.Err() != nil {
			return
		}
		if first {
			close(s.contacted)
		}
		ended := time.Now()
		timer := time.NewTimer(s.pause())
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
			continue
		case <-s.poked:
			timer.Stop()
		}
		spacing := time.NewTimer(pokeSpacing - time.Since(ended))
		select {
		case <-ctx.Done():
			spacing.Stop()
			return
		case <-spacing.C:
		}
	}
}

// pause is the time until the next contact. Jitter only shortens it, and keeps many servers from asking together.
func (s *Server) pause() time.Duration {
	d := s.cfg.FailingPollInterval
	if s.look().err == nil {
		d = s.cfg.PollInterval
	}
	return d - time.Duration(mathrand.Int64N(int64(d)/10+1)) //nolint:gosec // jitter is no secret
}

// contact asks the KMS how the key is.
func (s *Server) contact(ctx context.Context) {
	changes := s.look().changes
	res, err := s.cfg.KMS.Status(ctx)
	if ctx.Err() != nil {
		return // it was ended from this side, which says nothing of the KMS
	}
	if err != nil {
		s.bad(err)
		return
	}
	s.good(changes, res.KeyID)
	s.check(ctx)
}

// bad records a contact that failed.
func (s *Server) bad(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if was := s.known.err; was == nil || kmsclient.ClassOf(was) != kmsclient.ClassOf(err) {
		s.cfg.Logger.Warn("KMS contact is not good", "provider", s.cfg.Provider, "reason", text(err)[len(prefix):])
	}
	s.known.err = err
}

// good records a contact at which the KMS' Status said statusID. changes is from before it.
func (s *Server) good(changes int, statusID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := &s.known
	if k.err != nil || k.keyID == "" {
		s.cfg.Logger.Info("KMS key is usable", "provider", s.cfg.Provider, "keyID", statusID)
	}
	k.err, k.lastGood = nil, time.Now()
	// A Status that says what it said before is no news: Encrypt may have been ahead of it.
	if statusID != k.statusID {
		k.statusID = statusID
		if changes == k.changes {
			s.name(statusID, "state")
		}
	}
}

// encrypted records an answer of Encrypt. changes is from before the call.
func (s *Server) encrypted(changes int, keyID string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := &s.known
	if err != nil {
		if c := kmsclient.ClassOf(err); k.err == nil && (c == kmsclient.ClassDenied || c == kmsclient.ClassKeyUnusable) {
			s.poke() // Status should say so soon
		}
		return
	}
	if k.err != nil {
		s.poke() // it seems to be back
	}
	if changes == k.changes && k.keyID != "" {
		s.name(keyID, "a wrapped secret")
	}
}

// name sets the key ID that Status names. The caller holds mu.
func (s *Server) name(keyID, source string) {
	k := &s.known
	if keyID == k.keyID {
		return
	}
	if k.keyID != "" {
		s.cfg.Logger.Info("KMS key has changed", "provider", s.cfg.Provider, "from", k.keyID, "to", keyID, "toldBy", source)
	}
	k.keyID = keyID
	k.changes++
}

func (s *Server) poke() {
	select {
	case s.poked <- struct{}{}:
	default: // asked for already
	}
}

// check wraps something of no use while Encrypt is known to answer another key ID than the KMS' Status, to see which of the two it is by now.
// That is the KMS in the middle of a rotation, or one that never says the same, so it is done less and less often.
func (s *Server) check(ctx context.Context) {
	k := s.look()
	if k.keyID == k.statusID {
		s.verify = verification{}
		return
	}
	if time.Now().Before(s.verify.at) {
		return
	}
	data, uid := make([]byte, 32), make([]byte, 8)
	_, _ = rand.Read(data) // never fails
	_, _ = rand.Read(uid)
	res, err := s.cfg.KMS.Encrypt(ctx, "check-"+hex.EncodeToString(uid), data)
	if err == nil {
		s.encrypted(k.changes, res.KeyID, nil)
	}
	s.verify.after = min(max(2*s.verify.after, s.cfg.PollInterval), maxVerify)
	s.verify.at = time.Now().Add(s.verify.after)
}
