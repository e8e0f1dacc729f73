package keyring

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"fmt"
	"log/slog"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// mintDue reports whether a new seed is needed now that Status said keyID.
func (r *Ring) mintDue(ctx context.Context, keyID string) bool {
	if r.cfg.ReadOnly {
		return false
	}
	w := r.state.Load().writer
	if w == nil {
		return true
	}
	age := time.Since(w.minted)
	switch {
	case keyID != w.statusID:
		r.loop.mismatch = 0
		return true
	case keyID != w.keyID && age >= r.loop.mismatch:
		return true
	}
	return age >= r.cfg.MaxAge || w.seals.Load() >= r.cfg.MaxSeals || r.copiesDue(ctx, w)
}

// mint makes a seed with one KMS call, and has it unwrapped by a second one: nothing is sealed under what may not open later. The key ID in the KMS' answer is the one that counts for values; if it is not what Status said, the KMS is
// in the middle of a rotation, or never says the same: minting again is tried, less and less often.
func (r *Ring) mint(ctx context.Context, statusID string) (*writer, error) {
	w := &writer{statusID: statusID, recovery: r.recovery.Load()}
	if err := w.recovery.mayMint(); err != nil {
		return nil, fmt.Errorf("mint seed: %w", err)
	}
	k, err := r.dataKey(ctx)
	if err != nil {
		return nil, fmt.Errorf("mint seed: %w", err)
	}
	h := envelope.Header{Type: envelope.TypeSeed, KeyID: k.KeyID, Source: k.Ciphertext, Annotations: k.Annotations}
	if len(k.Plaintext) != envelope.SeedSize {
		return nil, &contractError{op: "GenerateDataKey", what: fmt.Sprintf("the data key has %d bytes, not %d", len(k.Plaintext), envelope.SeedSize)}
	}
	if bytes.Contains(k.Ciphertext, k.Plaintext) {
		return nil, &contractError{op: "GenerateDataKey", what: "the wrapped data key holds the data key itself"}
	}
	if err := h.Validate(); err != nil {
		return nil, &contractError{op: "GenerateDataKey", what: err.Error()}
	}
	if h.HasCopies() {
		return nil, &contractError{op: "GenerateDataKey", what: "an annotation has a name that is kept for recovery copies"}
	}
	w.header, w.sum = cloneHeader(&h), sha256.Sum256(k.Plaintext)
	if err := r.prove(ctx, w); err != nil {
		return nil, fmt.Errorf("mint seed: %w", err)
	}
	if k.KeyID != statusID { // a plugin may have learned the key's version by the call
		if again, err := r.status(ctx); err == nil && again.KeyID == k.KeyID {
			statusID, w.statusID = again.KeyID, again.KeyID
		}
	}
	if err := w.copySeed(ctx, &h, k.Plaintext); err != nil {
		return nil, fmt.Errorf("mint seed: %w", err)
	}
	seed, err := envelope.NewSeed(envelope.TypeSeed, k.Plaintext)
	if err != nil {
		return nil, fmt.Errorf("mint seed: %w", err)
	}
	frame, err := envelope.NewFrame(r.cfg.Provider, h, seed)
	if err != nil {
		return nil, fmt.Errorf("mint seed: %w", err)
	}
	w.frame, w.keyID, w.minted = frame, k.KeyID, time.Now()
	if w.keyID != statusID {
		r.loop.mismatch = min(max(2*r.loop.mismatch, r.cfg.PollInterval/2), maxMismatch)
	} else {
		r.loop.mismatch = 0
	}
	e := r.newEntry(digestOf(r.cfg.Provider, &h), &h, seed)
	e.sum = w.sum
	e.proven.Store(true)
	r.cfg.Cache.put(e)
	r.hot.put(frame.Rest(), e)
	r.cfg.Observer.Seed(r.cfg.Provider, EventMinted)
	r.cfg.Logger.Info("seed minted", "provider", r.cfg.Provider, "keyID", k.KeyID, slog.Bool("keyIDAsStatus", k.KeyID == statusID), "recoveryCopies", len(w.copies))
	r.logLacking(w)
	return w, nil
}

func (r *Ring) dataKey(ctx context.Context) (*kmsclient.DataKey, error) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.Timeout)
	defer cancel()
	uid := newUID()
	if g, ok := r.cfg.KMS.(kmsclient.DataKeyGenerator); ok {
		k, err := g.GenerateDataKey(ctx, uid)
		if err == nil && k == nil {
			err = &contractError{op: "GenerateDataKey", what: "there is no answer"}
		}
		return k, err
	}
	seed := make([]byte, envelope.SeedSize)
	_, _ = rand.Read(seed) // does not fail: crypto/rand ends the process instead
	// The backend gets a copy: what it does with its argument cannot become the seed.
	answer, err := r.cfg.KMS.Encrypt(ctx, uid, bytes.Clone(seed))
	if err != nil {
		return nil, err
	}
	if answer == nil {
		return nil, &contractError{op: "Encrypt", what: "there is no answer"}
	}
	return &kmsclient.DataKey{Plaintext: seed, Ciphertext: answer.Ciphertext, KeyID: answer.KeyID, Annotations: answer.Annotations}, nil
}
