package keyring

import (
	"time"
)

// doubt has the key checked ahead of time, and not for every stored value that the KMS will not unwrap.
func (r *Ring) doubt() {
	now := time.Now().UnixNano()
	if last := r.doubted.Load(); now-last >= int64(r.cfg.FailingPollInterval) && r.doubted.CompareAndSwap(last, now) {
		r.poke()
	}
}

// dropKey drops the seeds under one key ID. Those that the KMS still unwraps come back. Where the key is gone, what recovery copies gave stays.
func (r *Ring) dropKey(keyID string, cause error) {
	gone := isGone(cause)
	match := func(e *entry) bool {
		return e.by == r && e.byKeyID == keyID || e.ring == r && e.keyID == keyID && !gone
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

// deniedFor notes a denial for a key ID and returns how long it has lasted.
func (r *Ring) deniedFor(keyID string) time.Duration {
	r.mu.Lock()
	defer r.mu.Unlock()
	since, ok := r.denied[keyID]
	if !ok {
		if len(r.denied) < maxDenied {
			r.denied[keyID] = time.Now()
		}
		return 0
	}
	return time.Since(since)
}

func (r *Ring) isDenied(keyID string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	_, ok := r.denied[keyID]
	return ok
}
