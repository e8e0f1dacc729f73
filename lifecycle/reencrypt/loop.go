package reencrypt

import (
	"context"
	"time"
)

// Loop re-encrypts again and again: at its start, after each rotation of a key, and now and then.
type Loop struct {
	Config Config
	// Interval is the time between two runs for which there is no other reason.
	Interval time.Duration
	// Keys identifies what values are sealed with now, rules and keys. When it changes, there is a run.
	Keys func() string
	// Leader reports whether there is to be a run at all. nil is always.
	Leader func() bool
	// Ended is told how each run ended. It must not block for long.
	Ended func(Result, error)
}

const (
	followCheck = 5 * time.Second
	// followAgain is after a run that found something to do: what others sealed under the old key until they had learned of the new one.
	followAgain = 2 * time.Minute
)

// Run re-encrypts until ctx ends. A run under way is interrupted then, and told to Ended like any other.
func (f *Loop) Run(ctx context.Context) {
	var last time.Time // when a run ended; zero before the first
	keys, again := "", false
	tick := time.NewTicker(followCheck)
	defer tick.Stop()
	for {
		switch now := f.Keys(); {
		case f.Leader != nil && !f.Leader():
			last = time.Time{}
		case last.IsZero(), now != keys, time.Since(last) >= f.Interval, again && time.Since(last) >= followAgain:
			result, err := Run(ctx, f.Config)
			f.Ended(result, err)
			last, keys, again = time.Now(), now, err != nil || result.Rewritten > 0
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}
