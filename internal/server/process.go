package server

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
)

// part is something that runs until its context ends. An error ends the whole process.
type part = func(context.Context) error

// infallible makes a part of a function that cannot fail.
func infallible(run func(context.Context)) part {
	return func(ctx context.Context) error { run(ctx); return nil }
}

// process runs the parts of a server and handles signals.
type process struct {
	log      *slog.Logger
	audit    *auditlog.Log
	signals  <-chan os.Signal
	drain    time.Duration
	draining string // the log message when the drain begins
	hangup   func() // handles SIGHUP; nil if it ends the process like SIGTERM
}

// repeatedSignal is how soon after the first a second signal counts as the same: Ctrl-C reaches the
// process from the terminal, and again from a script that passes it on.
const repeatedSignal = 500 * time.Millisecond

// exitFailure is the exit code after a second signal.
const exitFailure = 3

var errSecondSignal = errors.New("a second signal")

// run runs serve until a signal, the failure of a part or the end of ctx. Parts of serving end when
// serve begins to drain. Parts of lasting end after serve has returned: what current calls need,
// and the admin server, which shows the drain.
func (p *process) run(ctx context.Context, serve part, serving, lasting []part) error {
	until, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	after, end := context.WithCancel(context.WithoutCancel(ctx))
	var rest sync.WaitGroup
	defer rest.Wait()
	defer end()
	start := func(ctx context.Context, parts []part) {
		for _, run := range parts {
			rest.Go(func() {
				if err := run(ctx); err != nil {
					stop(err)
				}
			})
		}
	}
	start(after, lasting)
	start(until, serving)
	rest.Go(func() { p.handleSignals(after, func() { stop(nil) }) })
	err := serve(until)
	if cause := context.Cause(until); err == nil && cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	stop(nil) // if serve ended without a signal
	if err == nil {
		p.log.Info("stopped")
	}
	return err
}

// handleSignals handles signals until ctx ends.
func (p *process) handleSignals(ctx context.Context, stop func()) {
	var stopping time.Time // of the first signal to stop
	for {
		select {
		case <-ctx.Done():
			return
		case s := <-p.signals:
			switch {
			case s == syscall.SIGHUP && p.hangup != nil:
				if stopping.IsZero() {
					p.hangup()
				}
			case stopping.IsZero():
				stopping = time.Now()
				p.log.Info(p.draining, "signal", s.String(), "drainTimeout", p.drain.String())
				stop()
			case time.Since(stopping) < repeatedSignal:
			default:
				p.log.Warn("second signal: exiting at once", "signal", s.String())
				p.audit.Stopped(errSecondSignal)
				os.Exit(exitFailure)
			}
		}
	}
}
