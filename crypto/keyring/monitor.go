package keyring

import (
	"context"
	"errors"
	"sync/atomic"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring/internal/settling"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// monitor makes the health checks of a ring's key. A check finds rotations, outages and
// revocations, and publishes the new state in one step.
type monitor struct {
	ring      *Ring
	p         *provider
	calls     *caller
	refusals  *refusals
	seeds     *seeds
	generator *generator

	// when Status last went back to a key ID that was left, in Unix seconds; 0 if it never did
	flapped atomic.Int64

	// What follows is used by the goroutine of the health checks alone.
	deniedSince time.Time // zero unless health checks are denied
	keyIDs      settling.KeyIDs
	probed      string                 // the last key that a probe was about
	probedAt    time.Time              // when the last round of probes was
	probePauses map[string]*probePause // keys whose probes were refused for no reason
}

// pause returns the time until the next health check. Jitter only shortens it, so that RevokeWithin
// holds.
func (m *monitor) pause() time.Duration {
	st := m.p.state.Load()
	d := min(m.p.cfg.FailingPollInterval, m.p.cfg.RevokeWithin)
	if st.healthy {
		d = min(m.p.cfg.PollInterval, m.p.cfg.RevokeWithin)
	}
	d = kmsclient.Jitter(d)
	if st.healthy && st.writer != nil {
		d = min(d, max(m.p.cfg.MaxAge-time.Since(st.writer.generated), 0))
	}
	if !m.deniedSince.IsZero() && st.revoked == nil {
		if left := m.p.cfg.RevokeWithin - time.Since(m.deniedSince); left > 0 {
			d = min(d, left)
		}
	}
	return d
}

// check is one health check: it calls Status, generates a seed if one is due, and verifies the seed
// in use, since Status may succeed although the key may not be used. The result is published in one
// step. While health checks fail, each operation is tried once in each.
func (m *monitor) check(ctx context.Context) {
	m.p.update(func(st *state) {
		if st.pending == nil {
			st.pending = make(chan struct{})
		}
	})
	m.seeds.expire()
	ctx = kmsclient.PastCircuit(ctx)
	if m.p.state.Load().err != nil {
		ctx = kmsclient.OneAttempt(ctx)
	}
	m.generator.verified = nil
	reported, err := m.statusKeyID(ctx)
	if err != nil {
		m.checkUnhealthy(ctx, err)
		return
	}
	keyID, w, err := m.useSettled(ctx, reported)
	if err == nil {
		m.noteGood(keyID, w, nil)
		m.probe(ctx, m.p.keyOf(keyID))
		return
	}
	m.noteBad(ctx, keyID, err)
	// The seed that stays in use is verified too, so that a KMS that refuses it is noticed.
	if w := m.p.state.Load().writer; w != nil && w != m.generator.verified && !refuses(err) && m.useDue() {
		if err := m.generator.verify(ctx, w); refuses(err) {
			m.noteBad(ctx, keyID, err)
		}
	}
	if m.p.state.Load().revoked == nil {
		m.probe(ctx, m.p.keyOf(keyID))
	}
}

// checkUnhealthy ends a health check whose Status failed. It does not probe other keys: some
// plugins report that they are unhealthy for a while after any failed call, so that probes of a
// refused key would keep them unhealthy. For the same reason it tries the key in use from time to
// time: if that works, values are encrypted and decrypted.
func (m *monitor) checkUnhealthy(ctx context.Context, status error) {
	if refuses(status) {
		m.noteBad(ctx, "", status)
		// no key behind the alias, or access denied: the values' own keys may still work
		if m.p.state.Load().revoked == nil {
			m.probe(ctx, "")
		}
		return
	}
	if !m.useDue() {
		m.noteBad(ctx, "", status)
		return
	}
	defer func() { m.generator.used = time.Now() }()
	if kmsclient.ReasonOf(status) == kmsclient.Unhealthy {
		e, _ := errors.AsType[*kmsclient.Error](status)
		keyID, w, err := m.useSettled(ctx, e.KeyID)
		switch {
		case err == nil:
			m.noteGood(keyID, w, status)
		case refuses(err):
			m.noteBad(ctx, keyID, err)
		default:
			m.noteBad(ctx, "", status)
			m.p.update(func(st *state) { st.works = false })
		}
		return
	}
	m.noteBad(ctx, "", status)
	if w := m.p.state.Load().writer; w != nil {
		err := m.generator.verify(ctx, w)
		if refuses(err) {
			m.noteBad(ctx, "", err)
		}
		m.p.update(func(st *state) { st.works = err == nil })
	}
}

// useSettled uses the key, and returns the key ID that counts and the seed to encrypt with. A key
// ID that Status goes back to counts as soon as the one in use does not work any more.
func (m *monitor) useSettled(ctx context.Context, reported string) (string, *writer, error) {
	keyID := m.settle(reported)
	w, err := m.generator.use(ctx, keyID)
	if err != nil && reported != keyID && !isNoResponse(err) {
		if other, oerr := m.generator.use(ctx, reported); oerr == nil {
			m.keyIDs.Adopt(m.p.state.Load().keyID, reported, time.Now())
			keyID, w, err = reported, other, nil
		}
	}
	if err == nil && w != nil {
		keyID = w.statusID
	}
	return keyID, w, err
}

// settle returns the key ID to use now that Status says keyID: that, or the one in use if keyID was
// in use a short time ago.
func (m *monitor) settle(keyID string) string {
	now, have := time.Now(), m.p.state.Load().keyID
	use, began, report := m.keyIDs.Decide(have, keyID, now)
	if began {
		m.flapped.Store(now.Unix())
	}
	if report {
		m.p.cfg.Logger.Warn("KMS key ID alternates: the one in use is kept until the KMS names another one for an hour; check whether two plugins or key versions serve one name",
			"provider", m.p.cfg.Provider, "keyID", have, "statusKeyID", keyID)
	}
	return use
}

// useDue reports whether to try the key in use although Status failed.
func (m *monitor) useDue() bool {
	pause := min(m.p.cfg.PollInterval, m.p.cfg.RevokeWithin) - m.p.cfg.FailingPollInterval
	if m.p.state.Load().writer == nil {
		pause = min(pause, 3*m.p.cfg.FailingPollInterval)
	}
	return !m.deniedSince.IsZero() || time.Since(m.generator.used) >= pause
}

// statusKeyID returns the key ID from Status. It calls Status twice for a first or new key ID: some
// plugins name the key's version only after a call.
func (m *monitor) statusKeyID(ctx context.Context) (string, error) {
	status, err := m.calls.status(ctx)
	if err != nil {
		return "", err
	}
	switch last := m.p.state.Load().keyID; {
	case last == status.KeyID, last == "" && !m.p.readOnly.Load(), m.keyIDs.Held(status.KeyID):
		return status.KeyID, nil
	}
	if again, err := m.calls.status(ctx); err == nil {
		return again.KeyID, nil
	}
	return status.KeyID, nil
}

// noteGood records a health check in which the key worked. status is why Status failed, or nil.
func (m *monitor) noteGood(keyID string, w *writer, status error) {
	m.deniedSince, m.generator.used = time.Time{}, time.Now()
	was := m.p.state.Load()
	if !was.works {
		m.refusals.lru.Purge() // they may have been part of an outage that is over
	}
	m.p.endCheck(func(st *state) {
		st.writer, st.keyID, st.healthy, st.lastGood, st.err, st.revoked, st.works = w, keyID, status == nil, time.Now(), status, nil, true
	})
	if was.revoked != nil {
		// the key unwraps them again
		m.seeds.evict(func(e *entry) bool { return e.ring == m.ring && e.unwrapper != m.ring })
	}
	switch {
	case status != nil:
		m.logBad(was, status)
	case !was.healthy:
		m.p.cfg.Observer.Seed(m.p.cfg.Provider, EventGood)
		m.p.cfg.Logger.Info("KMS key is usable", "provider", m.p.cfg.Provider, "keyID", keyID)
	}
}

// logBad logs a failed health check if the last one was good.
func (m *monitor) logBad(was *state, err error) {
	if was.healthy || was.err == nil {
		m.p.cfg.Observer.Seed(m.p.cfg.Provider, EventBad)
		m.p.cfg.Logger.Warn("KMS health check failed", "provider", m.p.cfg.Provider, "reason", describe(err))
	}
}

// noteBad records a failed health check, and revokes the key if the KMS says so. keyID is from
// Status, or "".
func (m *monitor) noteBad(ctx context.Context, keyID string, err error) {
	if ctx.Err() != nil {
		return // canceled here, which says nothing about the KMS
	}
	revoke, aliasLost := false, false
	switch kmsclient.ClassOf(err) {
	case kmsclient.ClassKeyUnusable:
		aliasLost = kmsclient.ReasonOf(err) == kmsclient.AliasNotFound
		revoke = !aliasLost
	case kmsclient.ClassDenied:
		if m.deniedSince.IsZero() {
			m.deniedSince = time.Now()
		}
		revoke = time.Since(m.deniedSince) >= m.p.cfg.RevokeWithin
	}
	was := m.p.state.Load()
	change := func(st *state) {
		st.healthy, st.err, st.works = false, err, st.works && kmsclient.ReasonOf(err) == kmsclient.Unhealthy
		if keyID != "" {
			st.keyID = keyID
		}
		if revoke {
			st.revoked = err
		}
		if revoke || aliasLost { // encrypt no more with the key that the alias led to
			st.writer = nil
		}
	}
	evicted, all := 0, func(string) bool { return true }
	if revoke {
		m.p.countRevocation()
		evicted = m.seeds.evictUnder(all, err) // before the revocation is published
	}
	m.p.endCheck(change)
	m.logBad(was, err)
	if revoke {
		evicted += m.seeds.evictUnder(all, err) // that were cached since
		if was.revoked == nil {
			m.p.cfg.Observer.Seed(m.p.cfg.Provider, EventRevoked)
			m.p.cfg.Logger.Error("KMS key may not be used: its DEK seeds are evicted", "provider", m.p.cfg.Provider, "reason", describe(err), "seeds", evicted)
		}
	}
}
