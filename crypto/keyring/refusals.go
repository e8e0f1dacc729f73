package keyring

import (
	"context"
	"errors"
	"time"

	lru "github.com/hashicorp/golang-lru/v2"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// refusals remembers the DEK seeds that the KMS refuses to unwrap, so that it is not called for
// each read of such a value.
type refusals struct {
	p     *provider
	calls *caller
	lru   *lru.Cache[digest, *refusal]
}

// refusal is the last failure to unwrap one seed, of a number in a row. It does not change.
type refusal struct {
	cause error
	calls int       // how many of them failed in a row
	since time.Time // of the first of these
	until time.Time // the KMS is not called for the seed before; zero if it may be called at once
}

const (
	// maxRefusals is how many refusals a ring remembers, about 1 KiB each.
	maxRefusals = 4096
	// lastingRefusal is how long the KMS must have refused a seed, while it unwrapped others, for
	// the value to count as one that cannot be decrypted later either.
	lastingRefusal = 5 * time.Minute
	// silentCalls is how many calls in a row for one seed must time out, while other calls succeed,
	// for that to be about the seed: a plugin may retry a refused seed until the deadline of the
	// call.
	silentCalls = 3
)

// note remembers a failed call for a seed, and returns what is remembered. The pause before the
// next call begins with half of FailingPollInterval and is doubled with each answer, up to
// PollInterval: with the defaults 5, 10, 20, 40 and then 60 seconds. However often clients read
// such a value, the KMS is called for it five times in the first minute at most, with the second
// attempt of the first call, and once in each later minute. Calls that time out are limited by the
// KMS client's circuit breaker, until enough of them count as being about the seed.
func (rf *refusals) note(d digest, cause error) *refusal {
	now := time.Now()
	next := &refusal{cause: cause, since: now}
	if rf.calls.base.Err() != nil || isNoResponse(cause) && (kmsclient.NotCalled(cause) || !errors.Is(cause, context.DeadlineExceeded)) {
		return next // this says nothing about the seed
	}
	if last, ok := rf.lru.Get(d); ok && isNoResponse(last.cause) == isNoResponse(cause) {
		next.calls, next.since = last.calls, last.since
	}
	next.calls++
	wait := next.calls
	if isNoResponse(cause) {
		if wait = 0; rf.p.state.Load().works {
			wait = next.calls - silentCalls + 1
		}
	}
	if wait > 0 {
		next.until = now.Add(rf.pauseAfter(wait))
	}
	rf.lru.Add(d, next)
	return next
}

// pauseAfter returns the pause before the next call for a seed after so many failed calls in a row.
func (rf *refusals) pauseAfter(refused int) time.Duration {
	return min(rf.p.cfg.FailingPollInterval/2<<min(refused-1, 16), max(rf.p.cfg.PollInterval, rf.p.cfg.FailingPollInterval))
}

// current returns the last refusal of a seed for which the KMS must not be called yet, or nil.
func (rf *refusals) current(d digest) *refusal {
	if last, ok := rf.lru.Get(d); ok && time.Now().Before(last.until) {
		return last
	}
	return nil
}

// failure returns what a refusal means for the values of a seed now. what is "seed", or "copy" for
// a recovery copy.
func (rf *refusals) failure(what string, h *envelope.Header, last *refusal) *Error {
	if own, ok := errors.AsType[*offlineError](last.cause); ok {
		// Not a permanent failure: an operator may have the identity that decrypts it.
		return rf.p.errorf(KeyUnusable, own, "the copy was not decrypted: %v", own)
	}
	if kmsclient.ClassOf(last.cause) == kmsclient.ClassInvalid {
		return rf.p.errorf(Corrupt, last.cause, "the %s under KMS key ID %q cannot be unwrapped: %s", what, Clip(h.KeyID), describe(last.cause))
	}
	kind := kindOf(last.cause)
	if kind == Unavailable && rf.p.state.Load().works && (!isNoResponse(last.cause) || last.calls >= silentCalls) {
		err := rf.p.errorf(SeedRefused, last.cause, "the %s under KMS key ID %q is refused, while the KMS unwraps others: it is damaged, or its key is disabled, gone or "+
			"not this KMS': %s", what, Clip(h.KeyID), describe(last.cause))
		if last.calls > 1 && !isNoResponse(last.cause) && time.Since(last.since) >= lastingRefusal && rf.calls.unwrapsOthers(last.since) {
			err.lost = rf.p
		}
		return err
	}
	return rf.p.markLost(rf.p.errorf(kind, last.cause, "the %s under KMS key ID %q was not unwrapped: %s", what, Clip(h.KeyID), describe(last.cause)), h, last.cause)
}

// isNoResponse reports whether a failed call for a seed had no response.
func isNoResponse(err error) bool {
	_, own := errors.AsType[*offlineError](err)
	return !own && kmsclient.ReasonOf(err) == kmsclient.Unreachable
}
