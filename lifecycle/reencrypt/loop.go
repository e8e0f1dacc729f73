package reencrypt

import (
	"context"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/restore"
)

// Loop re-encrypts repeatedly: at its start, after each rotation of a key and each restore of etcd,
// and at intervals.
type Loop struct {
	Config Config
	// Interval is the time between two runs for which there is no other reason.
	Interval time.Duration
	// Keys identifies the rules and keys that new values are encrypted with. When it changes, there
	// is a run.
	Keys func() string
	// Leader reports whether this process runs. nil means that it always does.
	Leader func() bool
	// Ended is called with the end of each run. It must not block for long.
	Ended func(Result, error)

	history restore.Detector
}

const (
	loopCheck = 5 * time.Second
	// loopRepeat is the time after a run that failed or rewrote values. Other proxies may have
	// encrypted values under the old key until they noticed the new one.
	loopRepeat = 2 * time.Minute
)

// Run re-encrypts until ctx ends. The current run is interrupted then, and Ended is called as for
// any other.
func (l *Loop) Run(ctx context.Context) {
	var last time.Time // when a run ended; zero before the first
	keys, again := "", false
	tick := time.NewTicker(loopCheck)
	defer tick.Stop()
	for {
		switch now := l.Keys(); {
		case l.Leader != nil && !l.Leader():
			last = time.Time{}
		case l.restored(ctx), last.IsZero(), now != keys, time.Since(last) >= l.Interval, again && time.Since(last) >= loopRepeat:
			result, err := Run(ctx, l.Config)
			l.Ended(result, err)
			last, keys, again = time.Now(), now, err != nil || result.Rewritten > 0
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// restored reports whether etcd was restored since the last call: a backup may hold values that are
// encrypted under older keys.
func (l *Loop) restored(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, loopCheck)
	defer cancel()
	restored, _, _, err := l.history.Check(ctx, l.Config.Client, l.Config.Prefix)
	return err == nil && restored // a later call notices what cannot be read now
}
