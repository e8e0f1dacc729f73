package reencrypt

import (
	"cmp"
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// setAside is a deferred value: its KMS did not unwrap its DEK seed, and did not say whether that
// is permanent.
type setAside struct {
	key    string
	seed   inventory.SeedID
	marker string // that the value begins with: it names the provider
	why    string
	last   time.Time // when the KMS failed to unwrap the seed
	since  time.Time // when it first did so although it was well; zero if it has not yet
}

// Limits of what is kept in memory.
const (
	maxAside    = 1000   // values; more are not read until these are settled
	maxVerdicts = 10_000 // seeds
)

// asideList holds the deferred values and the decisions about their DEK seeds. It is safe for
// concurrent use.
type asideList struct {
	settling sync.Mutex // held by the one that settles

	mu       sync.Mutex
	values   []setAside
	pending  map[inventory.SeedID]setAside // a value of each seed in values
	verdicts map[inventory.SeedID]string   // why values of a seed are left
}

func newAsideList() *asideList {
	return &asideList{pending: make(map[inventory.SeedID]setAside), verdicts: make(map[inventory.SeedID]string)}
}

// add defers values.
func (a *asideList) add(values ...setAside) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.values = append(a.values, values...)
	for _, v := range values {
		a.pending[v.seed] = v
	}
}

func (a *asideList) full() bool {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.values) >= maxAside
}

func (a *asideList) take() []setAside {
	a.mu.Lock()
	defer a.mu.Unlock()
	values := a.values
	a.values = nil
	clear(a.pending)
	return values
}

// isPending returns a deferred value of the same DEK seed.
func (a *asideList) isPending(id inventory.SeedID) (setAside, bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	v, ok := a.pending[id]
	return v, ok
}

// verdict returns why values of a DEK seed are skipped, if that was decided.
func (a *asideList) verdict(id inventory.SeedID) (why string, decided bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	why, decided = a.verdicts[id]
	return why, decided
}

// decide skips the values of a DEK seed. Beyond the limit, each value is decided on its own.
func (a *asideList) decide(id inventory.SeedID, why string) {
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
	r.aside.settling.Lock()
	defer r.aside.settling.Unlock()
	wait, told := newBackOff(), false
	wait.InitialInterval = time.Second
	for waiting := r.aside.take(); len(waiting) > 0; waiting = append(waiting, r.aside.take()...) {
		if err := r.awaitWell(ctx, waiting); err != nil {
			return err
		}
		var err error
		if waiting, err = r.tryAllAgain(ctx, waiting); err != nil {
			return err
		}
		if len(waiting) == 0 {
			continue
		}
		if !told {
			defer r.resume(waitRefused)
		}
		r.await(waitRefused, fmt.Sprintf("it is asked again before they are left, for %s at most: %s", refusedFor, waiting[0].why), !told)
		told = true
		if err = rest(ctx, wait.NextBackOff()); err != nil {
			return err
		}
	}
	return nil
}

// tryAllAgain tries deferred values again, and returns those to try once more.
func (r *run) tryAllAgain(ctx context.Context, values []setAside) (still []setAside, err error) {
	refused := make(map[inventory.SeedID]setAside) // in this round
	for _, v := range values {
		if last, ok := refused[v.seed]; ok { // the KMS is not asked for each value
			v.last, v.since = last.last, last.since
			still = append(still, v)
			continue
		}
		again, what, err := r.tryAgain(ctx, &v)
		if err != nil {
			return nil, err
		}
		if what != isAside {
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
		why := fmt.Sprintf("its KMS is well and does not unwrap its DEK seed: %s", again.why)
		r.aside.decide(again.seed, why)
		r.leave(leftRefused, []byte(again.key), why)
	}
	return still, nil
}

// awaitWell waits until the KMS of each value was healthy after it last failed to unwrap the DEK
// seed.
func (r *run) awaitWell(ctx context.Context, values []setAside) error {
	failed := make(map[*inventory.Rule]map[string]setAside) // the last for each rule and provider
	for _, v := range values {
		rule := r.cfg.Rules().Of([]byte(v.key))
		if rule == nil {
			continue
		}
		if failed[rule] == nil {
			failed[rule] = make(map[string]setAside)
		}
		if last := failed[rule][v.marker]; v.last.After(last.last) {
			failed[rule][v.marker] = v
		}
	}
	for rule, byProvider := range failed {
		for marker, v := range byProvider {
			if err := r.awaitContact(ctx, rule, []byte(marker), v); err != nil {
				return err
			}
		}
	}
	return nil
}

// quietWait is how long a wait for a KMS is not reported: the next health check takes a second or
// two.
const quietWait = 3 * time.Second

// awaitContact waits for a successful health check of the KMS that encrypted stored, after v
// failed.
func (r *run) awaitContact(ctx context.Context, rule *inventory.Rule, stored []byte, v setAside) error {
	wait, begun, told := newBackOff(), time.Now(), false
	for {
		state, ok := rule.Sealer.Recheck(stored)
		if !ok || state.Revoked || state.LastGood.After(v.last) { // a revoked KMS has said so: only a recovery copy was in doubt
			return nil
		}
		if time.Since(begun) >= quietWait {
			if !told {
				defer r.resume(waitKMS)
			}
			r.await(waitKMS, cmp.Or(state.Reason, v.why), !told)
			told = true
		}
		if err := rest(ctx, wait.NextBackOff()); err != nil {
			return err
		}
	}
}

// tryAgain tries a deferred value, and returns it again if it is refused again.
func (r *run) tryAgain(ctx context.Context, v *setAside) (again setAside, what finding, err error) {
	now, err := patientKV{KV: r.cfg.Client, run: r}.Get(ctx, v.key)
	if err != nil {
		return again, noRule, err
	}
	if len(now.Kvs) == 0 { // deleted, and stays so
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
	case noRule, isLeft, isAside:
	}
	return found.aside, found.what, err
}
