package reencrypt

import (
	"cmp"
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// deferredValue is a deferred value: its KMS did not unwrap its DEK seed, and did not say whether
// that is permanent.
type deferredValue struct {
	key    string
	seed   inventory.SeedID
	marker string // the prefix of the value, which names the provider
	why    string
	last   time.Time // when the KMS failed to unwrap the seed
	since  time.Time // when it first failed while it was healthy; zero if it has not yet
}

// Limits of what is kept in memory.
const (
	maxDeferred = 1000   // values; more are not read until these are settled
	maxVerdicts = 10_000 // seeds
)

// deferredList holds the deferred values and the decisions about their DEK seeds. It is safe for
// concurrent use.
type deferredList struct {
	settling sync.Mutex // held by the goroutine that runs settle

	mu       sync.Mutex
	values   []deferredValue
	pending  map[inventory.SeedID]deferredValue // one value for each seed in values
	verdicts map[inventory.SeedID]string        // why the values of a seed are skipped
}

func newDeferredList() *deferredList {
	return &deferredList{pending: make(map[inventory.SeedID]deferredValue), verdicts: make(map[inventory.SeedID]string)}
}

// add defers values.
func (a *deferredList) add(values ...deferredValue) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.values = append(a.values, values...)
	for _, v := range values {
		a.pending[v.seed] = v
	}
}

func (a *deferredList) full() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.values) >= maxDeferred
}

func (a *deferredList) take() []deferredValue {
	a.mu.Lock()
	defer a.mu.Unlock()
	values := a.values
	a.values = nil
	clear(a.pending)
	return values
}

// isPending returns a deferred value of the same DEK seed.
func (a *deferredList) isPending(id inventory.SeedID) (deferredValue, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	v, ok := a.pending[id]
	return v, ok
}

// verdict returns why values of a DEK seed are skipped, if that was decided.
func (a *deferredList) verdict(id inventory.SeedID) (why string, decided bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	why, decided = a.verdicts[id]
	return why, decided
}

// decide skips the values of a DEK seed. Beyond the limit, each value is decided on its own.
func (a *deferredList) decide(id inventory.SeedID, why string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if len(a.verdicts) < maxVerdicts {
		a.verdicts[id] = why
	}
}

// refusedFor is how long a healthy KMS must have refused a DEK seed before its values are skipped.
// A dry run tries twice.
const refusedFor = 15 * time.Second

// settle decides about the deferred values. It waits until the KMS of each value is healthy, tries
// the value again, and skips it once its DEK seed has been refused for refusedFor.
func (r *run) settle(ctx context.Context) error {
	r.deferred.settling.Lock()
	defer r.deferred.settling.Unlock()
	wait, paused := newBackOff(), pause{waits: &r.waits, what: waitRefused}
	wait.InitialInterval = time.Second
	defer paused.end()
	for waiting := r.deferred.take(); len(waiting) > 0; waiting = append(waiting, r.deferred.take()...) {
		if err := r.awaitHealthy(ctx, waiting); err != nil {
			return err
		}
		var err error
		if waiting, err = r.retryAll(ctx, waiting); err != nil {
			return err
		}
		if len(waiting) == 0 {
			continue
		}
		paused.report(fmt.Sprintf("it is retried for %s at most before they are skipped: %s", refusedFor, waiting[0].why))
		if err = sleep(ctx, wait.NextBackOff()); err != nil {
			return err
		}
	}
	return nil
}

// retryAll tries deferred values again, and returns those to try once more.
func (r *run) retryAll(ctx context.Context, values []deferredValue) (still []deferredValue, err error) {
	refused := make(map[inventory.SeedID]deferredValue) // in this round
	for _, v := range values {
		// one call to the KMS is enough for all values of a seed
		if last, ok := refused[v.seed]; ok {
			v.last, v.since = last.last, last.since
			still = append(still, v)
			continue
		}
		again, what, err := r.retryValue(ctx, &v)
		if err != nil {
			return nil, err
		}
		if what != isDeferred {
			continue
		}
		// Failures from before the KMS was healthy do not count.
		if again.since = v.since; again.seed != v.seed || v.since.IsZero() {
			again.since = again.last
		}
		if !r.cfg.DryRun && time.Since(again.since) < refusedFor {
			refused[again.seed] = again
			still = append(still, again)
			continue
		}
		why := fmt.Sprintf("its KMS is healthy and does not unwrap its DEK seed: %s", again.why)
		r.deferred.decide(again.seed, why)
		r.skip(skippedRefused, []byte(again.key), why)
	}
	return still, nil
}

// awaitHealthy waits until the KMS of each value has passed a health check since it last failed to
// unwrap the DEK seed.
func (r *run) awaitHealthy(ctx context.Context, values []deferredValue) error {
	// the last failure for each rule and provider
	failed := make(map[*inventory.Rule]map[string]deferredValue)
	for _, v := range values {
		rule := r.cfg.Rules().Of([]byte(v.key))
		if rule == nil {
			continue
		}
		if failed[rule] == nil {
			failed[rule] = make(map[string]deferredValue)
		}
		if last := failed[rule][v.marker]; v.last.After(last.last) {
			failed[rule][v.marker] = v
		}
	}
	for rule, byProvider := range failed {
		for marker, v := range byProvider {
			if err := r.awaitHealthCheck(ctx, rule, []byte(marker), v); err != nil {
				return err
			}
		}
	}
	return nil
}

// unreportedWait is the duration after which a wait for a KMS is reported. The next health check
// takes a second or two.
const unreportedWait = 3 * time.Second

// awaitHealthCheck waits for a successful health check of the KMS that encrypted stored, after v
// failed.
func (r *run) awaitHealthCheck(ctx context.Context, rule *inventory.Rule, stored []byte, v deferredValue) error {
	wait, begun, paused := newBackOff(), time.Now(), pause{waits: &r.waits, what: waitKMS}
	defer paused.end()
	for {
		state, ok := rule.Sealer.Recheck(stored)
		// the refusal of a revoked key is definite: only a recovery copy was not
		if !ok || state.Revoked || state.LastGood.After(v.last) {
			return nil
		}
		if time.Since(begun) >= unreportedWait {
			paused.report(cmp.Or(state.Reason, v.why))
		}
		if err := sleep(ctx, wait.NextBackOff()); err != nil {
			return err
		}
	}
}

// retryValue tries a deferred value, and returns it again if it is refused again.
func (r *run) retryValue(ctx context.Context, v *deferredValue) (again deferredValue, what finding, err error) {
	now, err := retryingKV{KV: r.cfg.Client, run: r}.Get(ctx, v.key)
	if err != nil {
		return again, noRule, err
	}
	if len(now.Kvs) == 0 { // deleted
		r.count(func(p *Progress) { p.Raced++ })
		return again, noRule, nil
	}
	found, err := r.renew(ctx, now.Kvs[0], false)
	if err != nil {
		return again, noRule, err
	}
	switch found.what {
	case isToWrite:
		err = r.store(ctx, []*item{found.next})
	case isCurrent:
		r.count(func(p *Progress) {
			if p.Pass == 1 {
				p.Current++
			}
		})
	case noRule, isSkipped, isDeferred:
	}
	return found.deferred, found.what, err
}
