package keyring

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// use returns the seed to seal under from now on, a new one if it is due, which the KMS has just
// unwrapped. It is nil for a ring that only reads; there a cached seed stands for the others.
func (r *Ring) use(ctx context.Context, keyID string) (*writer, error) {
	if !r.mintDue(ctx, keyID) {
		w := r.state.Load().writer
		if w == nil {
			return nil, r.proveSample(ctx, keyID)
		}
		err := r.prove(ctx, w)
		if err == nil || kmsclient.ClassOf(err) != kmsclient.ClassInvalid && !errors.Is(err, errOtherSecret) {
			return w, err
		}
		// Nothing more may be sealed under what the KMS does not know any more; values that wait get the next one.
		r.update(func(st *state) { st.writer = nil })
		r.cfg.Logger.Error("the KMS does not unwrap the seed in use; another is minted", "provider", r.cfg.Provider, "keyID", w.keyID, "reason", describe(err))
	}
	return r.mint(ctx, keyID)
}

// errOtherSecret is a KMS that does not give back what it wrapped.
var errOtherSecret error = &contractError{op: "Decrypt", what: "another data key than it had wrapped"}

// prove has the KMS unwrap the seed that is sealed under.
func (r *Ring) prove(ctx context.Context, w *writer) error {
	r.loop.provedBy, r.loop.used = w, time.Now()
	plain, err := r.ask(kmsclient.Expect(ctx, w.sum), w.header)
	switch {
	case err == nil && sha256.Sum256(plain) != w.sum, errors.Is(err, kmsclient.ErrOtherSecret):
		err = errOtherSecret
	}
	if err != nil {
		return fmt.Errorf("unwrap the seed in use: %w", err)
	}
	return nil
}

// proveSample has the KMS unwrap a cached seed of the current key, or the last of which that was true.
func (r *Ring) proveSample(ctx context.Context, keyID string) error {
	for _, e := range r.cfg.Cache.lru.Values() {
		if e.by == r && e.header != nil && r.keyOf(e.byKeyID) == r.keyOf(keyID) {
			r.loop.sample = e.header
		}
	}
	h := r.loop.sample
	if h == nil || r.keyOf(h.KeyID) != r.keyOf(keyID) {
		return nil
	}
	_, err := r.ask(ctx, h)
	if err != nil && kmsclient.ClassOf(err) != kmsclient.ClassInvalid {
		return fmt.Errorf("unwrap a seed in use: %w", err)
	}
	return nil
}

// probeBackOff is when a key is probed again that the KMS refuses without a reason. Its seeds are
// not dropped for that, so that nothing is gained by asking often.
type probeBackOff struct {
	wait time.Duration
	next time.Time
}

// maxProbeWait is the longest of these pauses.
const maxProbeWait = 30 * time.Minute

// probe unwraps one cached seed of each key but the one that the contact has spoken for, so that
// the revocation of an old key is noticed although its seeds are cached. It does so once in a poll
// interval at most. What is too much for one poll is left to the next.
func (r *Ring) probe(ctx context.Context, spokenFor string) {
	interval := min(r.cfg.PollInterval, r.cfg.RevokeWithin)
	if time.Since(r.loop.probedAt) < interval-interval/10-1 { // as pause has it
		return
	}
	r.loop.probedAt = time.Now()
	samples := make(map[string]*entry)
	for _, e := range r.cfg.Cache.lru.Values() { // the last used comes last
		if key := r.keyOf(e.byKeyID); e.by == r && e.header != nil && key != spokenFor {
			samples[key] = e
		}
	}
	// A denial of a key without a cached seed has nothing to revoke, and stored values could name any number of them.
	r.mu.Lock()
	maps.DeleteFunc(r.denied, func(key string, _ time.Time) bool { return samples[key] == nil })
	r.mu.Unlock()
	maps.DeleteFunc(r.loop.unprobed, func(key string, _ *probeBackOff) bool { return samples[key] == nil })
	keys := slices.Sorted(maps.Keys(samples))
	first, found := slices.BinarySearch(keys, r.loop.probed)
	if found {
		first++
	}
	for i := range min(len(keys), maxProbes) {
		key := keys[(first+i)%len(keys)]
		r.loop.probed = key
		if b := r.loop.unprobed[key]; b != nil && time.Now().Before(b.next) {
			continue
		}
		if !r.probeKey(ctx, key, samples[key]) {
			return
		}
	}
}

// probeKey unwraps a key's cached seed again, and drops all seeds of the key if the KMS says no. It is false when to go on is no use.
func (r *Ring) probeKey(ctx context.Context, key string, e *entry) bool {
	_, err := r.ask(kmsclient.Expect(kmsclient.OneAttempt(ctx), e.sum), e.header)
	if err == nil {
		delete(r.loop.unprobed, key)
		return true
	}
	ofKey := func(id string) bool { return r.keyOf(id) == key }
	switch kmsclient.ClassOf(err) {
	case kmsclient.ClassKeyUnusable:
		r.dropKeys(ofKey, e.byKeyID, err)
	case kmsclient.ClassDenied:
		if r.deniedFor(key, true) >= r.cfg.RevokeWithin {
			r.dropKeys(ofKey, e.byKeyID, err)
		}
	case kmsclient.ClassUnavailable:
		if !kmsclient.ReasonOf(err).Answered() {
			return false
		}
		b := r.loop.unprobed[key] // it may be this key alone
		if b == nil {
			b = &probeBackOff{wait: min(r.cfg.PollInterval, r.cfg.RevokeWithin)}
			r.loop.unprobed[key] = b
		}
		b.wait = min(2*b.wait, max(maxProbeWait, r.cfg.PollInterval))
		b.next = time.Now().Add(b.wait)
	}
	return ctx.Err() == nil
}

// keyOf returns the KMS key behind a key ID.
func (r *Ring) keyOf(keyID string) string {
	if r.cfg.KeyOf == nil {
		return keyID
	}
	return r.cfg.KeyOf(keyID)
}

// refuses reports whether a failed call says that the key may not be used.
func refuses(err error) bool {
	c := kmsclient.ClassOf(err)
	return c == kmsclient.ClassKeyUnusable || c == kmsclient.ClassDenied
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
	r.unwrapped.Store(time.Now().UnixNano())
	r.mu.Lock()
	delete(r.denied, r.keyOf(h.KeyID))
	r.mu.Unlock()
	return plain, nil
}
