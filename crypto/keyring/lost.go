package keyring

import (
	"errors"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// lostNotice is how often the log says that values are handed on as stored because their key is gone.
const lostNotice = time.Hour

// markLost marks the error of a value if the KMS said, of the value's own key, that there is none. What it says of the key in the configuration
// is about the value only if that is the same.
func (r *Ring) markLost(err *Error, h *envelope.Header, cause error) *Error {
	if e, ok := errors.AsType[*kmsclient.Error](cause); ok && kmsclient.ReasonOf(cause) == kmsclient.KeyNotFound && r.keyOf(e.KeyID) == r.keyOf(h.KeyID) {
		err.lost = r
	}
	return err
}

// notLost returns err without the mark.
func notLost(err *Error) *Error {
	return &Error{Kind: err.Kind, Text: err.Text, Err: err.Err, silent: err.silent, answered: err.answered}
}

// noteLost says, loudly, that a value was handed on as stored because its key is gone or refuses it
// for good.
func (r *Ring) noteLost(err *Error) {
	now := time.Now()
	last := r.lostLogged.Load()
	if last != 0 && now.Sub(time.Unix(last, 0)) < lostNotice || !r.lostLogged.CompareAndSwap(last, now.Unix()) {
		return
	}
	r.cfg.Logger.Error("values are handed on as stored, by their rule's policy: their KMS key is gone or has refused them for long; restore or delete them",
		"provider", r.cfg.Provider, "reason", err.Text)
}
