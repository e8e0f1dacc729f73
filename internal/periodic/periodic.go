// Package periodic calls a function at intervals, for work that continues until its process ends.
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
