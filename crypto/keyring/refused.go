package keyring

import (
	"context"
	"errors"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// refusal is what a KMS answered about one wrapped seed, the last time in a row that it did not
// unwrap it. It does not change.
type refusal struct {
	cause error
	asked int       // how often in a row
	since time.Time // of the first of these
	until time.Time // the KMS is not asked about the seed before; zero if it may be asked at once
}

const (
	// maxRefusals is how many of these a ring keeps, the least recently used going first. About 1
	// KiB each.
	maxRefusals = 4096
	// lastingRefusal is how long a seed must have been refused, while the KMS unwraps others, for
	// the policy of values that do not open later either.
	lastingRefusal = 5 * time.Minute
	// silentCalls is how often in a row a seed's call must have had no answer, while others have,
	// for that to be about the seed: the call of a plugin that tries a refused seed again and again
	// itself ends with its deadline.
	silentCalls = 3
)

// noteRefusal remembers a failed call for a seed, and returns what is remembered. The time in which
// the KMS is not asked again begins with half of FailingPollInterval and is doubled with each
// answer, up to PollInterval: with the defaults 5, 10, 20, 40 and then 60 seconds. However often
// clients read such a value, the KMS is called for it five times in the first minute at most, with
// the second attempt of the first call, and once in each later minute. The circuit breaker of the
// KMS client holds back calls that have no answer, until they are known to be about the seed.
func (r *Ring) noteRefusal(d digest, cause error) *refusal {
	now := time.Now()
	next := &refusal{cause: cause, since: now}
	if r.base.Err() != nil || isSilence(cause) && (kmsclient.NotCalled(cause) || !errors.Is(cause, context.DeadlineExceeded)) {
		return next // nothing was said about the seed, and no connection is no matter of one
	}
	if last, ok := r.refusals.Get(d); ok && isSilence(last.cause) == isSilence(cause) {
		next.asked, next.since = last.asked, last.since
	}
	next.asked++
	wait := next.asked
	if isSilence(cause) {
		if wait = 0; r.works() {
			wait = next.asked - silentCalls + 1
		}
	}
	if wait > 0 {
		next.until = now.Add(r.pauseAfter(wait))
	}
	r.refusals.Add(d, next)
	return next
}

// pauseAfter returns how long the KMS is not asked about a seed after so many answers in a row that
// were no use.
func (r *Ring) pauseAfter(answers int) time.Duration {
	return min(r.cfg.FailingPollInterval/2<<min(answers-1, 16), max(r.cfg.PollInterval, r.cfg.FailingPollInterval))
}

// refused returns what the KMS has answered about a seed so recently that it is not to be asked
// again, or nil.
func (r *Ring) refused(d digest) *refusal {
	if known, ok := r.refusals.Get(d); ok && time.Now().Before(known.until) {
		return known
	}
	return nil
}

// askedBefore reports whether the KMS has refused a seed before. One more attempt is enough then.
func (r *Ring) askedBefore(d digest) bool { return r.refusals.Contains(d) }

// isSilence reports whether a failed call for a seed had no answer.
func isSilence(err error) bool {
	if _, ok := errors.AsType[*contractError](err); ok {
		return false
	}
	return kmsclient.ClassOf(err) == kmsclient.ClassUnavailable && !kmsclient.ReasonOf(err).Answered()
}

// works reports whether the KMS key in use has worked when it was last used. If so, a refusal is
// about the seed that was refused, and is no outage.
func (r *Ring) works() bool { return r.state.Load().works }

// unwrapsOthers reports whether the KMS has unwrapped a seed since a time, and within the last two
// polls. A ring that only reads may have none that it could try at each poll.
func (r *Ring) unwrapsOthers(since time.Time) bool {
	last := time.Unix(0, r.unwrapped.Load())
	return last.After(since) && time.Since(last) <= 2*max(r.cfg.PollInterval, r.cfg.FailingPollInterval)
}

// notUnwrapped is what a refusal means for the values of a seed now. what is "seed", or "copy" for
// a recovery copy.
func (r *Ring) notUnwrapped(what string, h *envelope.Header, f *refusal) *Error {
	if kmsclient.ClassOf(f.cause) == kmsclient.ClassInvalid {
		return r.errorf(Corrupt, f.cause, "the %s under KMS key ID %q does not unwrap: %s", what, clip(h.KeyID), describe(f.cause))
	}
	kind := kindOf(f.cause)
	if kind == Unavailable && r.works() && (!isSilence(f.cause) || f.asked >= silentCalls) {
		err := r.errorf(SeedRefused, f.cause, "the %s under KMS key ID %q is refused, while the KMS unwraps others: it is damaged, or its key is disabled, gone or "+
			"not this KMS': %s", what, clip(h.KeyID), describe(f.cause))
		if f.asked > 1 && !isSilence(f.cause) && time.Since(f.since) >= lastingRefusal && r.unwrapsOthers(f.since) {
			err.lost = r
		}
		return err
	}
	return r.markLost(r.errorf(kind, f.cause, "the %s under KMS key ID %q was not unwrapped: %s", what, clip(h.KeyID), describe(f.cause)), h, f.cause)
}
