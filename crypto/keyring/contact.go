package keyring

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"errors"
	"fmt"
	mathrand "math/rand/v2"
	"time"

	"k8s.io/kms/pkg/service"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// loop is what only Run's goroutine touches.
type loop struct {
	deniedSince time.Time     // zero unless contacts are denied
	mismatch    time.Duration // pause before the next mint when the KMS wraps under another key ID than Status says
	ended       time.Time     // when the last contact ended

	used     time.Time // when the key in use was last tried
	provedBy *writer   // the seed whose unwrapping this contact has asked for; nil if it has not

	sample   *envelope.Header         // of a ring for reading only: a seed that the KMS has unwrapped
	probed   string                   // the last key that a probe was about
	probedAt time.Time                // when the last round of probes was
	unprobed map[string]*probeBackOff // keys whose probes were refused for no known reason
	settled  settling
}

const (
	pokeSpacing = time.Second // between contacts that callers asked for
	maxMismatch = time.Hour
	maxProbes   = 32 // other keys that are checked in one poll
)

// Run keeps the ring alive until ctx ends: it asks for the key's state, mints the first seed and the next ones, and revokes. Once it has
// returned nothing of the ring runs any more, and what would need the KMS fails. It returns nil when ctx ends, and an error if the ring was
// run before.
func (r *Ring) Run(ctx context.Context) error {
	if !r.running.CompareAndSwap(false, true) {
		return fmt.Errorf("run key ring of provider %q: it was run before", r.cfg.Provider)
	}
	defer r.close()
	for {
		r.contact(ctx)
		r.loop.ended = time.Now()
		timer := time.NewTimer(r.pause())
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-timer.C:
		case <-r.poked:
			timer.Stop()
			if !sleep(ctx, pokeSpacing-time.Since(r.loop.ended)) {
				return nil
			}
		}
	}
}

// close ends the calls under way and whoever waits for a contact.
func (r *Ring) close() {
	r.mu.Lock()
	r.stopped = true
	r.mu.Unlock()
	r.stop(errStopped)
	r.endContact(func(st *state) {
		if st.err == nil && !st.healthy {
			st.err = errStopped
		}
	})
	r.calls.Wait()
}

func sleep(ctx context.Context, d time.Duration) bool {
	if d <= 0 {
		return ctx.Err() == nil
	}
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// pause is the time until the next contact. Jitter only shortens it, so that RevokeWithin holds, and keeps many proxies from asking
// together.
func (r *Ring) pause() time.Duration {
	st := r.state.Load()
	d := min(r.cfg.FailingPollInterval, r.cfg.RevokeWithin)
	if st.healthy {
		d = min(r.cfg.PollInterval, r.cfg.RevokeWithin)
	}
	d -= time.Duration(mathrand.Int64N(int64(d)/10 + 1)) //nolint:gosec // jitter is no secret
	if st.healthy && st.writer != nil {
		d = min(d, max(r.cfg.MaxAge-time.Since(st.writer.minted), 0))
	}
	if !r.loop.deniedSince.IsZero() && st.revoked == nil {
		if left := r.cfg.RevokeWithin - time.Since(r.loop.deniedSince); left > 0 {
			d = min(d, left)
		}
	}
	return d
}

// contact asks the KMS how the key is, mints a seed if one is due, and has the seed in use
// unwrapped: Status may be answered although the key may not be used. The result is published in
// one step. While contacts fail, each operation has one attempt: the next contact is not far.
func (r *Ring) contact(ctx context.Context) {
	r.update(func(st *state) {
		if st.pending == nil {
			st.pending = make(chan struct{})
		}
	})
	ctx = kmsclient.PastCircuit(ctx)
	if r.state.Load().err != nil {
		ctx = kmsclient.OneAttempt(ctx)
	}
	r.loop.provedBy = nil
	said, err := r.currentKey(ctx)
	if err != nil {
		r.badStatus(ctx, err)
		return
	}
	keyID, w, err := r.useSettled(ctx, said)
	if err == nil {
		r.good(keyID, w, nil)
		r.probe(ctx, r.keyOf(keyID))
		return
	}
	r.bad(ctx, keyID, err)
	// The seed that stays in use is asked about: a KMS that refuses it is not to be missed.
	if w := r.state.Load().writer; w != nil && w != r.loop.provedBy && !refuses(err) && r.useDue() {
		if err := r.prove(ctx, w); refuses(err) {
			r.bad(ctx, keyID, err)
		}
	}
	if r.state.Load().revoked == nil {
		r.probe(ctx, r.keyOf(keyID))
	}
}

// badStatus ends a contact whose Status was not good. Then other keys are not probed: some plugins
// say that they are not healthy for a while after any call that failed, so that probes of a key
// that the KMS refuses would keep them from ever saying anything else. For the same reason a KMS
// that says so has the key in use tried, now and then: if it works, values are encrypted and
// decrypted.
func (r *Ring) badStatus(ctx context.Context, status error) {
	if refuses(status) {
		r.bad(ctx, "", status)
		if r.state.Load().revoked == nil { // the name leads to no key, or access is denied: only the keys themselves can say more
			r.probe(ctx, "")
		}
		return
	}
	if !r.useDue() {
		r.bad(ctx, "", status)
		return
	}
	defer func() { r.loop.used = time.Now() }()
	if kmsclient.ReasonOf(status) == kmsclient.Unhealthy {
		e, _ := errors.AsType[*kmsclient.Error](status)
		keyID, w, err := r.useSettled(ctx, e.KeyID)
		switch {
		case err == nil:
			r.good(keyID, w, status)
		case refuses(err):
			r.bad(ctx, keyID, err)
		default:
			r.bad(ctx, "", status)
			r.update(func(st *state) { st.works = false })
		}
		return
	}
	r.bad(ctx, "", status)
	if w := r.state.Load().writer; w != nil {
		err := r.prove(ctx, w)
		if refuses(err) {
			r.bad(ctx, "", err)
		}
		r.update(func(st *state) { st.works = err == nil })
	}
}

// useSettled uses the key, and returns the key ID that counts now that Status has said another, and
// the seed to seal under. A key ID that Status goes back to counts as soon as the one in use does not
// work any more.
func (r *Ring) useSettled(ctx context.Context, said string) (string, *writer, error) {
	keyID := r.settle(said)
	w, err := r.use(ctx, keyID)
	if err != nil && said != keyID && !isSilence(err) {
		if other, oerr := r.use(ctx, said); oerr == nil {
			keyID, w, err = r.adopt(said), other, nil
		}
	}
	if err == nil && w != nil {
		keyID = w.statusID
	}
	return keyID, w, err
}

// useDue reports whether the key in use is to be tried although Status is not good.
func (r *Ring) useDue() bool {
	pause := min(r.cfg.PollInterval, r.cfg.RevokeWithin) - r.cfg.FailingPollInterval
	if r.state.Load().writer == nil {
		pause = min(pause, 3*r.cfg.FailingPollInterval)
	}
	return !r.loop.deniedSince.IsZero() || time.Since(r.loop.used) >= pause
}

// currentKey returns the key ID that Status says. A first answer, or a new one, is asked for again:
// some plugins name the key after a start, and its version only once they have been called.
func (r *Ring) currentKey(ctx context.Context) (string, error) {
	status, err := r.status(ctx)
	if err != nil {
		return "", err
	}
	switch known := r.state.Load().keyID; {
	case known == status.KeyID, known == "" && !r.cfg.ReadOnly, r.loop.settled.waits(status.KeyID):
		return status.KeyID, nil
	}
	if again, err := r.status(ctx); err == nil {
		return again.KeyID, nil
	}
	return status.KeyID, nil
}

// good records a contact in which the key was used with success. status is why Status was not good,
// or nil.
func (r *Ring) good(keyID string, w *writer, status error) {
	r.loop.deniedSince, r.loop.used = time.Time{}, time.Now()
	was := r.state.Load()
	if !was.works {
		r.refusals.Purge() // they may have been the outage that is over
	}
	r.endContact(func(st *state) {
		st.writer, st.keyID, st.healthy, st.lastGood, st.err, st.revoked, st.works = w, keyID, status == nil, time.Now(), status, nil, true
	})
	if was.revoked != nil {
		r.drop(func(e *entry) bool { return e.ring == r && e.by != r }) // from now on the key itself unwraps
	}
	switch {
	case status != nil:
		r.noteBad(was, status)
	case !was.healthy:
		r.cfg.Observer.Seed(r.cfg.Provider, EventGood)
		r.cfg.Logger.Info("KMS key is usable", "provider", r.cfg.Provider, "keyID", keyID)
	}
}

// noteBad tells of a contact that was not good, if the last one was.
func (r *Ring) noteBad(was *state, err error) {
	if was.healthy || was.err == nil {
		r.cfg.Observer.Seed(r.cfg.Provider, EventBad)
		r.cfg.Logger.Warn("KMS contact is not good", "provider", r.cfg.Provider, "reason", describe(err))
	}
}

// bad records a contact that failed, and revokes if the answer says so. keyID is what Status said, or "".
func (r *Ring) bad(ctx context.Context, keyID string, err error) {
	if ctx.Err() != nil {
		return // the call was ended from this side, which says nothing of the KMS
	}
	revoke, nameless := false, false
	switch kmsclient.ClassOf(err) {
	case kmsclient.ClassKeyUnusable:
		nameless = kmsclient.ReasonOf(err) == kmsclient.AliasNotFound
		revoke = !nameless
	case kmsclient.ClassDenied:
		if r.loop.deniedSince.IsZero() {
			r.loop.deniedSince = time.Now()
		}
		revoke = time.Since(r.loop.deniedSince) >= r.cfg.RevokeWithin
	}
	was := r.state.Load()
	change := func(st *state) {
		st.healthy, st.err, st.works = false, err, st.works && kmsclient.ReasonOf(err) == kmsclient.Unhealthy
		if keyID != "" {
			st.keyID = keyID
		}
		if revoke {
			st.revoked = err
		}
		if revoke || nameless { // under the key that the name led to nothing more is to be sealed
			st.writer = nil
		}
	}
	dropped := 0
	// A key that is gone leaves what recovery copies gave; one that somebody has disabled does not.
	gone := kmsclient.ReasonOf(err).Gone()
	mine := func(e *entry) bool { return e.by == r || e.ring == r && !gone }
	if revoke {
		r.mu.Lock()
		r.gen++
		r.mu.Unlock()
		dropped = r.drop(mine) // so that nothing opens once the ring is said to be revoked
	}
	r.endContact(change)
	r.noteBad(was, err)
	if revoke {
		dropped += r.drop(mine) // what came in between
		if was.revoked == nil {
			r.cfg.Observer.Seed(r.cfg.Provider, EventRevoked)
			r.cfg.Logger.Error("KMS key may not be used: its seeds are dropped", "provider", r.cfg.Provider, "reason", describe(err), "seeds", dropped)
		}
	}
}

// endContact publishes a change and lets go whoever waits for the contact.
func (r *Ring) endContact(change func(*state)) {
	var pending chan struct{}
	r.update(func(st *state) {
		change(st)
		pending, st.pending = st.pending, nil
	})
	if pending != nil {
		close(pending)
	}
}

// status asks the KMS for the current key ID.
func (r *Ring) status(ctx context.Context) (*service.StatusResponse, error) {
	ctx, cancel := context.WithTimeout(ctx, r.cfg.Timeout)
	defer cancel()
	status, err := r.cfg.KMS.Status(ctx)
	switch {
	case err != nil:
		return nil, fmt.Errorf("ask for the key's status: %w", err)
	case status == nil || status.KeyID == "" || len(status.KeyID) > envelope.MaxKeyID:
		return nil, &contractError{op: "Status", what: "the key ID is empty or over-long"}
	case status.Healthz != "ok":
		return nil, &kmsclient.Error{Op: "Status", Provider: r.cfg.Provider, Reason: kmsclient.Unhealthy, KeyID: status.KeyID, Detail: "health is not ok"}
	}
	return status, nil
}

func newUID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // does not fail: crypto/rand ends the process instead
	return hex.EncodeToString(b[:])
}
