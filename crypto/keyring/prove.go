package keyring

import (
	"context"
	"crypto/sha256"
	"fmt"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// proven returns the seed to seal under from now on, a new one if it is due, which the KMS has just unwrapped. It is nil for a ring that only reads;
// there a cached seed stands for the others.
func (r *Ring) proven(ctx context.Context, keyID string) (*writer, error) {
	if !r.mintDue(ctx, keyID) {
		w := r.state.Load().writer
		if w == nil {
			return nil, r.proveSample(ctx, keyID)
		}
		err := r.prove(ctx, w)
		if err == nil || classOf(err) != kmsclient.ClassInvalid {
			return w, err
		}
		// Nothing more may be sealed under what the KMS does not know any more; values that wait get the next one.
		r.update(func(st *state) { st.writer = nil })
		r.cfg.Logger.Error("the KMS does not unwrap the seed in use; another is minted", "provider", r.cfg.Provider, "keyID", w.keyID, "reason", describe(err))
	}
	return r.mint(ctx, keyID)
}

// prove has the KMS unwrap the seed that is sealed under.
func (r *Ring) prove(ctx context.Context, w *writer) error {
	plain, err := r.ask(ctx, w.header)
	if err == nil && sha256.Sum256(plain) != w.sum {
		err = &contractError{op: "Decrypt", what: "another data key than it had wrapped"}
	}
	if err != nil {
		return fmt.Errorf("unwrap the seed in use: %w", err)
	}
	return nil
}

// proveSample has the KMS unwrap a cached seed of the current key, or the last of which that was true.
func (r *Ring) proveSample(ctx context.Context, keyID string) error {
	for _, e := range r.cfg.Cache.lru.Values() {
		if e.by == r && e.header != nil && e.byKeyID == keyID {
			r.loop.sample = e.header
		}
	}
	h := r.loop.sample
	if h == nil || h.KeyID != keyID {
		return nil
	}
	_, err := r.ask(ctx, h)
	if err != nil && classOf(err) != kmsclient.ClassInvalid {
		return fmt.Errorf("unwrap a seed in use: %w", err)
	}
	return nil
}

// ask has the KMS unwrap the secret behind a header.
func (r *Ring) ask(ctx context.Context, h *envelope.Header) ([]byte, error) {
	if !r.begin() {
		return nil, errStopped
	}
	defer r.calls.Done()
	ctx, cancel := context.WithTimeout(ctx, r.cfg.Timeout)
	defer cancel()
	plain, err := r.cfg.KMS.Decrypt(ctx, newUID(), &service.DecryptRequest{Ciphertext: h.Source, KeyID: h.KeyID, Annotations: h.Own()})
	if err == nil && len(plain) == 0 {
		err = &contractError{op: "Decrypt", what: "the answer is empty"}
	}
	if err != nil {
		return nil, err
	}
	r.mu.Lock()
	delete(r.denied, h.KeyID)
	r.mu.Unlock()
	return plain, nil
}
