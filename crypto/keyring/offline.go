package keyring

import (
	"errors"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

// OfflineKey wraps recovery copies with public keys, in place of a KMS. Its private keys are
// offline: a proxy does not have them, so that it can wrap and not unwrap. It is safe for
// concurrent use.
type OfflineKey interface {
	// ID identifies the public keys, and changes with them.
	ID() string
	// Wrap returns the seed as an age file, and the ID of the keys that it was wrapped with. It
	// does not retain seed. The text of an error is safe to show.
	Wrap(seed []byte) (file []byte, id string, err error)
	// CanUnwrap reports whether there are private keys, which only commands have.
	CanUnwrap() bool
	// Unwrap returns the seed in an age file. The text of an error is safe to show.
	Unwrap(file []byte) ([]byte, error)
}

// An offline ring has an [OfflineKey] and no KMS. It is always healthy: nothing is polled, and
// nothing can revoke a public key. It wraps and unwraps recovery copies, and encrypts and decrypts
// no values of its own.

// IsOffline reports whether the ring has an [OfflineKey].
func (r *Ring) IsOffline() bool { return r.p.cfg.Offline != nil }

// overrides reports whether the ring's copies decrypt values whose key is disabled: an operator has
// handed a command the private keys for that purpose.
func (r *Ring) overrides() bool { return r.IsOffline() && r.p.cfg.Offline.CanUnwrap() }

// readOfflineID publishes the ID of the public keys.
func (r *Ring) readOfflineID() {
	r.p.update(func(st *state) {
		st.keyID, st.healthy, st.works, st.lastGood = r.p.cfg.Offline.ID(), true, true, time.Now()
		st.pending = nil
	})
}

// wrapOffline is wrapCopy of an offline ring.
func (c *caller) wrapOffline(seed []byte) (copyID, map[string][]byte, error) {
	file, id, err := c.p.cfg.Offline.Wrap(seed)
	if err != nil {
		return copyID{}, nil, &offlineError{err}
	}
	var h envelope.Header
	h.SetOfflineCopy(c.p.cfg.Provider, envelope.OfflineCopy{Recipients: id, File: file})
	return copyID{provider: c.p.cfg.Provider, keyID: id, statusID: id}, h.Annotations, nil
}

// unwrapOffline is unwrap of an offline ring.
func (c *caller) unwrapOffline(h *envelope.Header) ([]byte, error) {
	key := c.p.cfg.Offline
	if !key.CanUnwrap() {
		return nil, &offlineError{errNoPrivateKey}
	}
	seed, err := key.Unwrap(h.Source)
	if err != nil {
		return nil, &offlineError{err}
	}
	c.unwrapped.Store(time.Now().UnixNano())
	return seed, nil
}

var errNoPrivateKey = errors.New("its private keys are offline; the commands decrypt, verify, status, reencrypt and drill take them with --identity")

// offlineError is the failure of an [OfflineKey]. Its text is safe to show.
type offlineError struct{ cause error }

func (e *offlineError) Error() string { return e.cause.Error() }

func (e *offlineError) Unwrap() error { return e.cause }
