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
	if e, ok := errors.AsType[*kmsclient.Error](cause); ok && isMissing(cause) && r.keyOf(e.KeyID) == r.keyOf(h.KeyID) {
		err.lost = r
	}
	return err
}

// absent is that the KMS did not know the key of a seed, for a while: a list holds many values of one.
type absent struct {
	err   *Error
	until time.Time
}

// maxAbsent is how many of these are kept.
const maxAbsent = 1024

func (r *Ring) noteAbsent(d digest, err *Error) {
	if err.lost != nil {
		r.absent.Add(d, absent{err, time.Now().Add(r.cfg.FailingPollInterval)})
	}
}

// knownAbsent returns what the KMS said of a seed just now, if that was that it does not know the key, or nil.
func (r *Ring) knownAbsent(d digest) *Error {
	if a, ok := r.absent.Get(d); ok && time.Now().Before(a.until) {
		return a.err
	}
	return nil
}

// notLost returns err without the mark.
func notLost(err *Error) *Error {
	return &Error{Kind: err.Kind, Text: err.Text, Err: err.Err, silent: err.silent, answered: err.answered}
}

// noteLost says, loudly, that a value was handed on as stored because its key is gone.
func (r *Ring) noteLost(err *Error) {
	now := time.Now()
	last := r.lostLogged.Load()
	if last != 0 && now.Sub(time.Unix(last, 0)) < lostNotice || !r.lostLogged.CompareAndSwap(last, now.Unix()) {
		return
	}
	r.cfg.Logger.Error("values are handed on as stored, by their rule's policy: their KMS key is gone, and with it what they held; restore or delete them",
		"provider", r.cfg.Provider, "reason", err.Text)
}
