package keyring

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// provider is what all parts of a ring share: its configuration, its texts and the published state.
type provider struct {
	cfg RingConfig
	// of the annotations with copies that this provider wraps; "" if its name does not do
	copyName string
	state    atomic.Pointer[state]
	poller   *kmsclient.Poller

	running   atomic.Bool
	readOnly  atomic.Bool    // no seed is generated
	suspected rate.Sometimes // limits the health checks that stored values cause
	// limits how often the log says that values are returned as stored whose key is gone
	lostLogged rate.Sometimes

	mu      sync.Mutex // of writes of state too
	stopped bool       // no call may begin
	revoked uint64     // how often the key was revoked; an unwrap that spans a revocation is void
}

// state is what decides whether values are encrypted and decrypted. A published state does not
// change.
type state struct {
	writer  *writer // nil: no seed to encrypt with
	keyID   string  // from the last good Status; "" before
	healthy bool    // the last health check was good
	// the last use of the key in use succeeded; a KMS may say that it is not healthy and work
	works    bool
	lastGood time.Time // when the last good health check ended
	// why the last health check failed; nil if it was good, and before the first
	err error
	// not nil: the key may not be used, and this is the KMS' error that says so
	revoked error
	pending chan struct{} // not nil while a health check runs, closed when it ends
}

// kmsError returns why the last health check failed, but for a missing recovery copy: two rings
// that copy each other's seeds would otherwise wait for each other.
func (st *state) kmsError() error {
	if _, ok := errors.AsType[*recoveryError](st.err); ok {
		return nil
	}
	return st.err
}

// update publishes a changed copy of the state.
func (p *provider) update(change func(*state)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	next := *p.state.Load()
	change(&next)
	p.state.Store(&next)
}

// endCheck publishes the result of a health check and wakes the goroutines that wait for it.
func (p *provider) endCheck(change func(*state)) {
	var pending chan struct{}
	p.update(func(st *state) {
		change(st)
		pending, st.pending = st.pending, nil
	})
	if pending != nil {
		close(pending)
	}
}

// suspect has the key checked at once, but not for every stored value that the KMS refuses to
// unwrap.
func (p *provider) suspect() { p.suspected.Do(p.poller.Wake) }

// isDisabled reports whether the key was revoked on purpose, and not because it is gone.
func (p *provider) isDisabled() bool {
	revoked := p.state.Load().revoked
	return revoked != nil && !kmsclient.ReasonOf(revoked).Gone()
}

// revocations returns how often the key was revoked.
func (p *provider) revocations() uint64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.revoked
}

// countRevocation makes void what is being unwrapped now.
func (p *provider) countRevocation() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.revoked++
}

// keyOf returns the KMS key behind a key ID.
func (p *provider) keyOf(keyID string) string {
	if p.cfg.KeyOf == nil {
		return keyID
	}
	return p.cfg.KeyOf(keyID)
}

// errorf makes an Error that names the provider and the key ID.
func (p *provider) errorf(kind Kind, cause error, format string, args ...any) *Error {
	text := fmt.Sprintf("KMS provider %q", p.cfg.Provider)
	if id := p.state.Load().keyID; id != "" && kind != Corrupt {
		text += fmt.Sprintf(", key ID %q", id)
	}
	return &Error{Kind: kind, Text: text + ": " + fmt.Sprintf(format, args...), Err: cause}
}

// markLost marks a value's error if the KMS said that it does not have the value's own key. What
// the KMS says of the configured key counts only if the value has the same key.
func (p *provider) markLost(err *Error, h *envelope.Header, cause error) *Error {
	if e, ok := errors.AsType[*kmsclient.Error](cause); ok && kmsclient.ReasonOf(cause) == kmsclient.KeyNotFound && p.keyOf(e.KeyID) == p.keyOf(h.KeyID) {
		err.lost = p
	}
	return err
}

// notLost returns err without the mark.
func notLost(err *Error) *Error {
	return &Error{Kind: err.Kind, Text: err.Text, Err: err.Err, silent: err.silent, responded: err.responded}
}

// noteLost logs as an error that a value was returned as stored, because its key is gone or its
// seed has been refused for long.
func (p *provider) noteLost(err *Error) {
	p.lostLogged.Do(func() {
		p.cfg.Logger.Error("values are returned as stored, by their rule's policy: their KMS key is gone or has refused their DEK seeds for long; restore or delete them",
			"provider", p.cfg.Provider, "reason", err.Text)
	})
}
