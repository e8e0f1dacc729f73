package keyring

import (
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// doubt has the key checked ahead of time, and not for every stored value that the KMS will not unwrap.
func (r *Ring) doubt() {
	now := time.Now().UnixNano()
	if last := r.doubted.Load(); now-last >= int64(r.cfg.FailingPollInterval) && r.doubted.CompareAndSwap(last, now) {
		r.poke()
	}
}

// dropKeys drops the seeds under key IDs. Those that the KMS still unwraps come back. Where the key is gone, what recovery copies gave stays. keyID
// is the one that was asked about.
func (r *Ring) dropKeys(under func(keyID string) bool, keyID string, cause error) {
	gone := kmsclient.ReasonOf(cause).Gone()
	match := func(e *entry) bool {
		return e.by == r && under(e.byKeyID) || e.ring == r && under(e.keyID) && !gone
	}
	if n := r.drop(match); n > 0 {
		r.cfg.Observer.Seed(r.cfg.Provider, EventRevoked)
		r.cfg.Logger.Warn("seeds of a KMS key are dropped", "provider", r.cfg.Provider, "keyID", keyID, "reason", describe(cause), "seeds", n)
	}
}

// drop takes every seed that match accepts out of use, and returns how many these were.
func (r *Ring) drop(match func(*entry) bool) int {
	n := r.cfg.Cache.dropAll(match)
	// The fast path can hold entries that the cache has let go.
	for i := range r.hot.slots {
		if s := r.hot.slots[i].Load(); s != nil && match(s.entry) {
			s.entry.dead.Store(true)
			r.hot.slots[i].CompareAndSwap(s, nil)
		}
	}
	r.recent.Clear()
	return n
}

// deniedFor notes a denial for a key and returns how long it has lasted. Only of a key whose seeds are cached it is sure to be noted.
func (r *Ring) deniedFor(key string, cached bool) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	since, ok := r.denied[key]
	if !ok {
		if cached || len(r.denied) < maxDenied {
			r.denied[key] = time.Now()
		}
		return 0
	}
	return time.Since(since)
}
