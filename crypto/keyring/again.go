package keyring

import (
	"context"
	"crypto/sha256"
	"errors"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
)

// doubt is that the KMS was asked again for the secret of a seed that has opened no value yet. It
// does not change.
type doubt struct {
	same  bool      // it gave the same secret, so that a value that does not open is damaged
	asked int       // how often
	until time.Time // it is not asked again before
}

// openAgain is about a seed that has opened no value yet, nor this one: a KMS that answers garbage
// must not make a value look damaged, so it is asked once more for the secret, and then less and
// less often. The error is of kind Corrupt if it gave the same one, and [ErrWouldBlock] if try says
// that the KMS must not be called.
func (r *Ring) openAgain(ctx context.Context, e *entry, etcdKey, object []byte, try bool) ([]byte, *Error) {
	if known := e.doubt.Load(); known != nil && time.Now().Before(known.until) {
		return nil, r.notOpened(e, known)
	}
	if try {
		return nil, errWouldBlock
	}
	if ctx.Err() != nil {
		return nil, r.errorf(Unavailable, context.Cause(ctx), "the caller went away before the seed of a value that does not open was unwrapped again")
	}
	h := e.header
	if e.by == r && h == nil {
		if o, err := envelope.Parse(object); err == nil {
			h = cloneHeader(&o.Header)
		}
	}
	if h == nil {
		r.cfg.Cache.drop(e)
		return nil, r.errorf(Unavailable, nil, "the data does not open, and the annotations of its seed are too large to be kept for unwrapping it again")
	}
	answer := r.flights.DoChan("again"+string(e.digest[:]), func() (any, error) {
		return r.unwrapAgain(e, h)
	})
	select {
	case <-ctx.Done():
		return nil, r.errorf(Unavailable, context.Cause(ctx), "the caller went away while a seed was unwrapped again")
	case a := <-answer:
		if err, ok := errors.AsType[*Error](a.Err); ok {
			return nil, err
		} else if a.Err != nil {
			return nil, r.errorf(Unavailable, a.Err, "the seed was not unwrapped again")
		}
		now := a.Val.(*entry)
		if o, err := envelope.Parse(object); now != e && err == nil {
			if plaintext, err := now.seed.Open(nil, etcdKey, o.Data); err == nil {
				now.proven.Store(true)
				return plaintext, nil
			}
		}
		return nil, r.notOpened(now, now.doubt.Load())
	}
}

// notOpened is what is known of a value that a seed does not open.
func (r *Ring) notOpened(e *entry, d *doubt) *Error {
	if d == nil || d.same { // nil: it has opened another value meanwhile
		return r.errorf(Corrupt, nil, "the data does not open")
	}
	cause := &contractError{op: "Decrypt", what: "two secrets for one wrapped seed"}
	return r.errorf(SeedRefused, cause, "the seed under KMS key ID %q: %v", clip(e.keyID), cause)
}

// unwrapAgain asks the KMS, and returns the entry that is cached now: e, or one with the other
// secret that it gave.
func (r *Ring) unwrapAgain(e *entry, h *envelope.Header) (*entry, error) {
	known := e.doubt.Load()
	if e.proven.Load() || known != nil && time.Now().Before(known.until) {
		return e, nil // another caller has asked
	}
	calls, cancel := context.WithCancel(e.by.base)
	defer cancel()
	defer context.AfterFunc(r.base, cancel)()
	gen := e.by.generation()
	plain, err := e.by.decrypt(calls, h)
	if err != nil {
		r.cfg.Cache.drop(e)
		return nil, e.by.notUnwrapped("seed", h, e.by.noteRefusal(e.digest, err))
	}
	next := &doubt{same: sha256.Sum256(plain) == e.sum, asked: 1}
	if known != nil {
		next.asked += known.asked
	}
	next.until = time.Now().Add(r.pauseAfter(next.asked))
	if next.same {
		e.doubt.Store(next)
		return e, nil
	}
	r.cfg.Cache.drop(e)
	seed, err := envelope.NewSeed(h.Type, plain)
	if err != nil {
		return nil, e.by.notUnwrapped("seed", h, e.by.noteRefusal(e.digest, &contractError{op: "Decrypt", what: err.Error()}))
	}
	other := &entry{
		ring: e.ring, digest: e.digest, seed: seed, typ: e.typ, keyID: e.keyID, copies: e.copies, by: e.by, byKeyID: e.byKeyID, sum: sha256.Sum256(plain), header: e.header,
		fetched: time.Now(), rescue: e.rescue, why: e.why,
	}
	other.doubt.Store(next)
	r.cfg.Cache.put(other)
	if e.by.generation() != gen || r.isRefused() {
		r.cfg.Cache.drop(other)
		return nil, r.errorf(Unavailable, nil, "the key's state changed while a seed was unwrapped again")
	}
	return other, nil
}
