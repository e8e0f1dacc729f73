// Package periodic calls a function at intervals, and waits, until a context ends.
package periodic

import (
	"context"
	"time"
)

// Run calls f at once and then at each interval, until ctx ends. A call that takes longer delays
// the next one.
func Run(ctx context.Context, interval time.Duration, f func()) {
	tick := time.NewTicker(interval)
	defer tick.Stop()
	for {
		f()
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// Wait waits for d, or until ctx ends. It returns the error of ctx.
func Wait(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
	return ctx.Err()
}
