package kmsclient

import (
	"context"
	mathrand "math/rand/v2"
	"time"
)

// wakeSpacing is the least time between two health checks of a [Poller].
const wakeSpacing = time.Second

// Poller runs the regular health checks of one KMS key. Wake may be called at any time, the rest is
// for the goroutine of Run.
type Poller struct {
	check func(ctx context.Context)
	pause func() time.Duration
	woken chan struct{}
}

// NewPoller makes a Poller that calls check, and calls it again after the pause that is returned
// then.
func NewPoller(check func(ctx context.Context), pause func() time.Duration) *Poller {
	return &Poller{check: check, pause: pause, woken: make(chan struct{}, 1)}
}

// Wake has the next health check made at once, or a second after the last one. It does not wait for
// it, and several calls before it are one.
func (p *Poller) Wake() {
	select {
	case p.woken <- struct{}{}:
	default:
	}
}

// Run checks until ctx ends.
func (p *Poller) Run(ctx context.Context) {
	for {
		select {
		case <-p.woken: // the check that follows is theirs
		default:
		}
		p.check(ctx)
		ended := time.Now()
		woken, ok := p.sleep(ctx, p.pause(), p.woken)
		if woken {
			_, ok = p.sleep(ctx, wakeSpacing-time.Since(ended), nil)
		}
		if !ok {
			return
		}
	}
}

// sleep waits for d or for wake; ok is false if ctx has ended.
func (*Poller) sleep(ctx context.Context, d time.Duration, wake <-chan struct{}) (woken, ok bool) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return false, false
	case <-wake:
		return true, true
	case <-timer.C:
		return false, ctx.Err() == nil
	}
}

// Jitter returns d or up to a tenth less, so that many processes do not check together, and none
// later than after d.
func Jitter(d time.Duration) time.Duration {
	return d - time.Duration(mathrand.Int64N(int64(d)/10+1)) //nolint:gosec // jitter is no secret
}
