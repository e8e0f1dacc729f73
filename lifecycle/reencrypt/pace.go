package reencrypt

import (
	"context"
	"slices"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// The rate is adjusted after every paceTxns transactions.
const (
	paceTxns = 16
	slowTxn  = 250 * time.Millisecond // the median from which on etcd is slow
	quickTxn = slowTxn / 4            // and below which it is quick again
	paceMost = 8                      // the rate is at most so many times lower than at first
)

// pace limits the rate of writes, and lowers it while etcd is slow, to protect other clients of
// etcd. It is safe for concurrent use.
type pace struct {
	limiter *rate.Limiter
	most    rate.Limit // as configured
	onSlow  func(slow bool)

	mu     sync.Mutex
	recent []time.Duration // since begun
	begun  time.Time
	keys   int
	first  rate.Limit // how quick it was before it was lowered; 0 while it is not
}

// newPace returns a pace of so many keys per second (0 is no limit), and so many per transaction.
// onSlow is called when the rate is lowered, and when it is restored.
func newPace(perSecond float64, burst int, onSlow func(slow bool)) *pace {
	p := &pace{most: rate.Inf, onSlow: onSlow}
	if perSecond > 0 {
		p.most = rate.Limit(perSecond)
	}
	p.limiter = rate.NewLimiter(p.most, burst)
	return p
}

// wait waits until so many keys may be written.
func (p *pace) wait(ctx context.Context, keys int) error {
	if err := p.limiter.WaitN(ctx, keys); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return err
	}
	return nil
}

// took records the duration of a transaction of so many keys.
func (p *pace) took(d time.Duration, keys int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	now := time.Now()
	if len(p.recent) == 0 {
		p.begun = now.Add(-d)
	}
	p.recent, p.keys = append(p.recent, d), p.keys+keys
	if len(p.recent) < paceTxns {
		return
	}
	slices.Sort(p.recent)
	median, seconds := p.recent[paceTxns/2], now.Sub(p.begun).Seconds()
	p.judge(median, rate.Limit(float64(p.keys)/max(seconds, 1e-3)))
	p.recent, p.keys = p.recent[:0], 0
}

// judge adjusts the rate, based on the rate achieved.
func (p *pace) judge(median time.Duration, real rate.Limit) {
	switch {
	case median > slowTxn:
		if p.first == 0 {
			p.first = real
			p.onSlow(true)
		}
		p.limiter.SetLimit(max(min(real, p.limiter.Limit())/2, p.first/paceMost))
	case median < quickTxn && p.first > 0:
		next := p.limiter.Limit() * 2
		if next >= p.most || next >= p.first*2 {
			next, p.first = p.most, 0
			p.onSlow(false)
		}
		p.limiter.SetLimit(next)
	}
}
