package keyring

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// maxProbes is how many keys one health check probes.
const maxProbes = 32

// probePause is when a key is probed again that the KMS refuses without a reason. Its seeds stay
// cached, so that frequent probes are of no use.
type probePause struct {
	wait time.Duration
	next time.Time
}

// maxProbeWait is the longest of these pauses.
const maxProbeWait = 30 * time.Minute

// probe unwraps one cached seed of each key but checked, which the health check has used, so that
// the revocation of an old key is noticed although its seeds are cached. It does so at most once in
// a poll interval, for maxProbes keys; the next round continues with the others.
func (m *monitor) probe(ctx context.Context, checked string) {
	interval := min(m.p.cfg.PollInterval, m.p.cfg.RevokeWithin)
	if time.Since(m.probedAt) < interval-interval/10-1 { // as pause has it
		return
	}
	m.probedAt = time.Now()
	samples := make(map[string]*entry)
	for _, e := range m.p.cfg.Cache.lru.Values() { // the last used comes last
		if key := m.p.keyOf(e.unwrapperKeyID); e.unwrapper == m.ring && e.header != nil && key != checked {
			samples[key] = e
		}
	}
	// A denied key without a cached seed has nothing to revoke, and stored values can name any
	// number of them.
	m.calls.keepDenials(func(key string) bool { return samples[key] != nil })
	maps.DeleteFunc(m.probePauses, func(key string, _ *probePause) bool { return samples[key] == nil })
	keys := slices.Sorted(maps.Keys(samples))
	first, found := slices.BinarySearch(keys, m.probed)
	if found {
		first++
	}
	for i := range min(len(keys), maxProbes) {
		key := keys[(first+i)%len(keys)]
		m.probed = key
		if b := m.probePauses[key]; b != nil && time.Now().Before(b.next) {
			continue
		}
		if !m.probeKey(ctx, key, samples[key]) {
			return
		}
	}
}

// probeKey unwraps a key's cached seed again, and evicts all seeds of the key if the KMS refuses
// it. It returns false if the KMS does not answer.
func (m *monitor) probeKey(ctx context.Context, key string, e *entry) bool {
	_, err := m.calls.unwrap(kmsclient.Expect(kmsclient.OneAttempt(ctx), e.sum), e.header)
	if err == nil {
		delete(m.probePauses, key)
		return true
	}
	ofKey := func(id string) bool { return m.p.keyOf(id) == key }
	switch kmsclient.ClassOf(err) {
	case kmsclient.ClassKeyUnusable:
		m.seeds.evictKeys(ofKey, e.unwrapperKeyID, err)
	case kmsclient.ClassDenied:
		if m.calls.deniedFor(key, true) >= m.p.cfg.RevokeWithin {
			m.seeds.evictKeys(ofKey, e.unwrapperKeyID, err)
		}
	case kmsclient.ClassUnavailable:
		if !kmsclient.ReasonOf(err).Responded() {
			return false
		}
		b := m.probePauses[key] // this may be about this key alone
		if b == nil {
			b = &probePause{wait: min(m.p.cfg.PollInterval, m.p.cfg.RevokeWithin)}
			m.probePauses[key] = b
		}
		b.wait = min(2*b.wait, max(maxProbeWait, m.p.cfg.PollInterval))
		b.next = time.Now().Add(b.wait)
	}
	return ctx.Err() == nil
}
