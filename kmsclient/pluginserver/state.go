package pluginserver

import (
	"context"
	"crypto/rand"
	"sync"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// maxTrialPause is the longest pause between trials of Encrypt.
const maxTrialPause = time.Hour

// keyState is the result of the health checks of a server's key.
type keyState struct {
	cfg     *Config
	checks  *kmsclient.Poller
	checked chan struct{} // closed after the first health check

	mu      sync.Mutex
	current key // guarded by mu

	trials trials // only the goroutine of the health checks uses it
}

// key is the key as the health checks found it.
type key struct {
	keyID    string    // that Encrypt returns; "" before the first good health check
	statusID string    // from the KMS' own last Status
	err      error     // of the last health check; nil if it was good
	lastGood time.Time // when the last good health check ended
	changes  int       // of keyID, so that a response from before a change does not undo it
}

// trials is when Encrypt is tried next, while it returns another key ID than Status.
type trials struct {
	pause time.Duration
	next  time.Time
}

// State is a server's state, for metrics and health.
type State struct {
	Provider string
	KeyID    string    // in Status; "" before the first good health check
	Healthy  bool      // whether the last health check was good
	Reason   string    // why not; holds nothing secret
	LastGood time.Time // zero before the first good health check
}

// State returns the result of the last health check. It is safe for concurrent use and makes no KMS
// call.
func (s *Server) State() State {
	k := s.key.load()
	st := State{Provider: s.cfg.Provider, KeyID: k.keyID, Healthy: k.err == nil && k.keyID != "", LastGood: k.lastGood}
	switch {
	case k.err != nil:
		st.Reason = k.err.Error()
	case !st.Healthy:
		st.Reason = "the KMS has not answered yet"
	}
	return st
}

func (s *keyState) load() key {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.current
}

// pause returns the time until the next health check.
func (s *keyState) pause() time.Duration {
	if s.load().err == nil {
		return kmsclient.Jitter(s.cfg.PollInterval)
	}
	return kmsclient.Jitter(s.cfg.FailingPollInterval)
}

// check makes one health check.
func (s *keyState) check(ctx context.Context) {
	changes := s.load().changes
	res, err := s.cfg.KMS.Status(ctx)
	if ctx.Err() != nil {
		return // canceled here, which says nothing about the KMS
	}
	if err != nil {
		s.noteBad(err)
	} else {
		s.noteGood(changes, res.KeyID)
		s.tryEncrypt(ctx)
	}
	select {
	case <-s.checked:
	default:
		if ctx.Err() == nil {
			close(s.checked)
		}
	}
}

// noteBad records a failed health check.
func (s *keyState) noteBad(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if was := s.current.err; was == nil || kmsclient.ClassOf(was) != kmsclient.ClassOf(err) {
		s.cfg.Logger.Warn("KMS health check failed", "provider", s.cfg.Provider, "reason", text(err)[len(prefix):])
	}
	s.current.err = err
}

// noteGood records a health check whose Status named statusID. changes is from before it.
func (s *keyState) noteGood(changes int, statusID string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := &s.current
	if k.err != nil || k.keyID == "" {
		s.cfg.Logger.Info("KMS key is usable", "provider", s.cfg.Provider, "keyID", statusID)
	}
	k.err, k.lastGood = nil, time.Now()
	// If Status has not changed, Encrypt may have been ahead of it.
	if statusID != k.statusID {
		k.statusID = statusID
		if changes == k.changes {
			s.setKeyID(statusID, "Status")
		}
	}
}

// noteEncrypted records a response of Encrypt. changes is from before the call.
func (s *keyState) noteEncrypted(changes int, keyID string, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	k := &s.current
	if err != nil {
		if c := kmsclient.ClassOf(err); k.err == nil && (c == kmsclient.ClassDenied || c == kmsclient.ClassKeyUnusable) {
			s.checks.Wake() // so that Status says so soon
		}
		return
	}
	if k.err != nil {
		s.checks.Wake() // the KMS seems to work again
	}
	if changes == k.changes && k.keyID != "" {
		s.setKeyID(keyID, "Encrypt")
	}
}

// setKeyID sets the key ID in Status. The caller holds mu.
func (s *keyState) setKeyID(keyID, source string) {
	k := &s.current
	if keyID == k.keyID {
		return
	}
	if k.keyID != "" {
		s.cfg.Logger.Info("KMS key has changed", "provider", s.cfg.Provider, "from", k.keyID, "to", keyID, "source", source)
	}
	k.keyID = keyID
	k.changes++
}

// tryEncrypt wraps random data while Encrypt returns another key ID than the KMS' Status, to see
// which of the two it is by now. The KMS is being rotated then, or its key IDs never agree, so that
// the pause between two trials gets longer.
func (s *keyState) tryEncrypt(ctx context.Context) {
	k := s.load()
	if k.keyID == k.statusID {
		s.trials = trials{}
		return
	}
	if time.Now().Before(s.trials.next) {
		return
	}
	data := make([]byte, 32)
	_, _ = rand.Read(data) // never fails
	res, err := s.cfg.KMS.Encrypt(ctx, "check-"+rand.Text(), data)
	if err == nil {
		s.noteEncrypted(k.changes, res.KeyID, nil)
	}
	s.trials.pause = min(max(2*s.trials.pause, s.cfg.PollInterval), maxTrialPause)
	s.trials.next = time.Now().Add(s.trials.pause)
}
