package keyring

import (
	"context"
	"crypto/sha256"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// openAgain asks the KMS once more for the secret of a seed that has opened no value yet, nor this one: a KMS that answers garbage must not make a
// value look damaged. The error is of kind Corrupt if the KMS gives the same secret again.
func (r *Ring) openAgain(ctx context.Context, e *entry, etcdKey, object []byte) ([]byte, *Error) {
	o, err := envelope.Parse(object)
	if err != nil {
		return nil, r.errorf(Corrupt, err, "%v", err)
	}
	h := e.header
	if e.by == r {
		h = cloneHeader(&o.Header)
	}
	if h == nil {
		return nil, r.errorf(Unavailable, nil, "the data does not open, and its recovery copy is too large to be asked for again")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(e.by.base, cancel)()
	plain, err := e.by.decrypt(ctx, h)
	if err != nil {
		return nil, e.by.notUnwrapped(h, err)
	}
	if sha256.Sum256(plain) == e.sum {
		return nil, r.errorf(Corrupt, nil, "the data does not open")
	}
	if seed, serr := envelope.NewSeed(h.Type, plain); serr == nil {
		if plaintext, oerr := seed.Open(nil, etcdKey, o.Data); oerr == nil {
			return plaintext, nil
		}
	}
	cause := &contractError{op: "Decrypt", what: "two secrets for one wrapped seed"}
	return nil, r.errorf(Unavailable, cause, "the seed under KMS key ID %q: %v", clip(h.KeyID), cause)
}

// notUnwrapped is what a failed decrypt means for the values of a seed.
func (r *Ring) notUnwrapped(h *envelope.Header, err error) *Error {
	if classOf(err) == kmsclient.ClassInvalid {
		return r.errorf(Corrupt, err, "the seed under KMS key ID %q does not unwrap: %s", clip(h.KeyID), describe(err))
	}
	return r.markLost(r.errorf(kindOf(err), err, "the seed under KMS key ID %q was not unwrapped: %s", clip(h.KeyID), describe(err)), h, err)
}
