package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"sync"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

func newServe() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve",
		Short: "run the proxy",
		Long: `serve runs the proxy until SIGTERM or SIGINT. It starts with etcd or the KMS unreachable, keeps trying, and serves what it can.

The first SIGTERM or SIGINT drains: no connection is accepted any more, calls under way are finished, watches are ended so that their clients
reconnect elsewhere, and what is left after --drain-timeout is cut. Another one, half a second later or more, exits at once, with 3.

SIGHUP, or a change of the file, reloads the rules, the log level, and the allowedClients and ciphertextClients of listeners; other changes are named in the
log and wait for a restart. A reload that would protect keys less than before is refused without --allow-weakening. SIGHUP also checks every KMS at once,
and a change of a local key file checks that one: a new version is used from then on.

Under systemd, a listener with the address systemd://NAME takes the sockets of a socket unit. Readiness, draining and the watchdog are notified
(Type=notify, WatchdogSec=).

Logs go to standard error.`,
		Args: cobra.NoArgs,
	}
	path := configFlag(cmd)
	drain := cmd.Flags().Duration("drain-timeout", proxy.DefaultDrainTimeout, "how long calls under way may take after the first SIGTERM or SIGINT")
	weaken := cmd.Flags().Bool("allow-weakening", false, "let the start and reloads remove or narrow rules, write plaintext, allow plaintext reads or make sealed values unreadable")
	scan := cmd.Flags().Duration("scan-interval", 0, "count the values in etcd so often, for metrics; 0s: never. One of several proxies does it")
	renew := cmd.Flags().Bool("reencrypt", false, "re-encrypt the values in etcd, at the start and after each rotation. One of several proxies does it")
	renewInterval := cmd.Flags().Duration("reencrypt-interval", time.Hour, "with --reencrypt, the time between two runs for which there is no other reason")
	renewRate := cmd.Flags().Float64("reencrypt-rate", 0, "with --reencrypt, values a second, at most; 0: as many as etcd takes")
	cmd.RunE = fails(func(cmd *cobra.Command, _ []string) error {
		if *drain <= 0 {
			return &failure{code: exitUsage, err: fmt.Errorf("--drain-timeout %v is not more than 0s", *drain)}
		}
		if *scan < 0 || *scan > 0 && *scan < time.Second {
			return &failure{code: exitUsage, err: fmt.Errorf("--scan-interval %v is neither 0s nor a second or more", *scan)}
		}
		if *renewInterval < time.Second || *renewRate < 0 {
			return &failure{code: exitUsage, err: errors.New("--reencrypt-interval is at least 1s, --reencrypt-rate at least 0")}
		}
		o := serveOptions{drain: *drain, weaken: *weaken, scan: *scan, renewRate: *renewRate}
		if *renew {
			o.renew = *renewInterval
		}
		return serve(cmd, *path, o)
	})
	return cmd
}

// serveOptions are the flags of serve.
type serveOptions struct {
	drain   time.Duration
	weaken  bool
	scan    time.Duration // 0: never
	sockets sockets       // from systemd

	renew     time.Duration // the interval of re-encrypting; 0: never
	renewRate float64
}

func serve(cmd *cobra.Command, path string, o serveOptions) error {
	// From here on, a signal is answered by this function and by nothing else.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer signal.Stop(signals)
	signal.Ignore(syscall.SIGPIPE) // a log that nobody reads any more is no reason to end

	loaded := digest(path) // first, so that a change while the proxy starts is seen
	var warnings config.Problems
	c, err := loadChecked(cmd, path, backendChecks(func(p config.Problem) { warnings = append(warnings, p) }))
	if err != nil {
		return err
	}
	level := new(slog.LevelVar)
	level.Set(logLevel(c.Log.Level))
	log := newLogger(cmd.ErrOrStderr(), c.Log.Format, level)
	warnOf(log, path, warnings)
	relaxGC()
	if o.sockets, err = inheritedSockets(); err != nil {
		return err
	}
	if err := o.sockets.check(c.Listeners); err != nil {
		o.sockets.close()
		return err
	}
	a, err := newApp(c, log, o)
	if err != nil {
		return startFailure(err)
	}
	defer a.close()
	if o.scan > 0 {
		if !c.Coordination.Enabled {
			return &failure{code: exitFailure, err: errors.New("--scan-interval needs coordination.enabled"), hint: "the proxies find out by it which of them scans"}
		}
		a.scanner = newScanner(a, o.scan)
	}
	if o.renew > 0 {
		if !c.Coordination.Enabled {
			return &failure{code: exitFailure, err: errors.New("--reencrypt needs coordination.enabled"), hint: "the proxies find out by it which of them does it, and that all can read it"}
		}
		a.renewer = newReencryptor(a, c, o.renew, o.renewRate)
	}
	for i, addr := range a.proxy.Addrs() {
		log.Info("serving", "listener", c.Listeners[i].Address, "address", addr.String(), "tls", c.Listeners[i].TLS != nil)
		if c.Listeners[i].InsecurePlaintext {
			log.Warn("insecurePlaintext: everything that this listener carries crosses the network in the clear", "listener", c.Listeners[i].Address)
		}
	}
	if a.admin != nil {
		log.Info("admin serving", "address", a.admin.Addr().String())
	}
	if len(c.Rules) == 0 {
		log.Warn("there are no rules: every value passes as it is")
	}
	r := &reloader{path: path, seen: loaded, inUse: loaded, app: a, running: c, level: level, weaken: o.weaken, log: log}
	a.live = append(a.live, liveFile{"configuration", r.problem})
	a.audit.started(loaded)
	err = a.run(cmd.Context(), r, signals, o.drain)
	a.audit.stopped(err)
	return err
}

// relaxGC lets the heap grow to four times what is in use before it is collected, where Go's default is twice. Nearly all that the proxy allocates
// lives for one call, over a small heap that would otherwise be collected many times a second: a fifth less CPU time for half as much memory again.
// The environment variable GOGC has precedence.
func relaxGC() {
	if os.Getenv("GOGC") == "" {
		debug.SetGCPercent(300)
	}
}

// run serves until a signal, a failure or the end of ctx. What the proxy needs to finish its calls, the rings, stops after it; the admin
// server stops last, so that the drain can be watched.
func (a *app) run(ctx context.Context, r *reloader, signals <-chan os.Signal, drain time.Duration) error {
	serving, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	lasting, end := context.WithCancel(context.WithoutCancel(ctx))
	var rest sync.WaitGroup
	defer rest.Wait()
	defer end()
	for _, ring := range a.rings {
		rest.Go(func() {
			if err := ring.Run(lasting); err != nil {
				stop(err)
			}
		})
	}
	for _, f := range a.files {
		rest.Go(func() { f.watch(lasting, a.log) })
	}
	for _, k := range a.legacy {
		rest.Go(func() { k.watch(lasting, r) })
	}
	rest.Go(func() { a.watchLive(lasting) })
	for _, w := range a.watches {
		rest.Go(func() { w.run(lasting) })
	}
	if a.scanner != nil {
		rest.Go(func() { a.scanner.run(serving) })
	}
	if a.renewer != nil {
		rest.Go(func() { a.renewer.Run(serving) })
	}
	rest.Go(func() {
		if err := a.fleet.run(serving, r.weaken); err != nil {
			stop(err)
		}
	})
	if a.admin != nil {
		rest.Go(func() {
			if err := a.admin.Run(lasting); err != nil {
				stop(err)
			}
		})
	}
	rest.Go(func() { a.obey(lasting, signals, r, func() { stop(nil) }, drain) })
	rest.Go(func() { r.watch(serving) })
	rest.Go(func() { a.announce(serving) })
	rest.Go(func() { notifier{a.log}.watch(lasting, func() { a.ready() }) })
	err := a.proxy.Run(serving)
	if cause := context.Cause(serving); err == nil && cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	stop(nil) // when the proxy ended by itself
	if err == nil {
		a.log.Info("stopped")
	}
	return err
}

// echo is how soon after the first a second signal is taken for the same: Ctrl-C reaches the proxy from the terminal, and again from a script
// that passes it on.
const echo = 500 * time.Millisecond

var errSecondSignal = errors.New("a second signal")

// obey answers signals until ctx ends.
func (a *app) obey(ctx context.Context, signals <-chan os.Signal, r *reloader, stop func(), drain time.Duration) {
	var stopping time.Time // when the first signal to stop came
	for {
		select {
		case <-ctx.Done():
			return
		case s := <-signals:
			switch {
			case s == syscall.SIGHUP && stopping.IsZero():
				a.checkKeys()
				r.reload("SIGHUP")
			case s == syscall.SIGHUP:
			case stopping.IsZero():
				stopping = time.Now()
				a.log.Info("draining; a second signal exits at once", "signal", s.String(), "drainTimeout", drain.String())
				stop()
			case time.Since(stopping) < echo:
			default:
				a.log.Warn("second signal: exiting at once", "signal", s.String())
				a.audit.stopped(errSecondSignal)
				os.Exit(exitFailure)
			}
		}
	}
}

// startFailure adds what to do to the errors that operators meet most.
func startFailure(err error) error {
	f := &failure{code: exitFailure, err: err}
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		f.hint = "another process listens there: stop it, or choose another address under listeners or admin"
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		f.hint = "this machine has no such address: choose another under listeners or admin"
	case errors.Is(err, proxy.ErrNoFolder):
		f.hint = "make it, for the user the proxy runs as, and again at each boot if it is below /run (systemd: RuntimeDirectory=); or choose another address under listeners"
	case errors.Is(err, os.ErrPermission):
		f.hint = "check that the user the proxy runs as may use this file, folder or port"
	}
	return f
}

func logLevel(name string) slog.Level {
	var l slog.Level
	_ = l.UnmarshalText([]byte(name)) // checked by config; the zero value is info
	return l
}

func newLogger(w io.Writer, format string, level slog.Leveler) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if format == "text" {
		return slog.New(slog.NewTextHandler(w, options))
	}
	return slog.New(slog.NewJSONHandler(jsonText{w}, options))
}

// warnOf logs what may be meant, and is mostly not.
func warnOf(log *slog.Logger, path string, warnings config.Problems) {
	for _, p := range warnings {
		log.Warn("configuration: "+p.Text, "file", path, "line", p.Line, "path", p.Path, "hint", p.Hint)
	}
}

// problemAttrs is how a configuration's problem reads in the log.
func problemAttrs(path string, p config.Problem) []any {
	return []any{"file", path, "line", p.Line, "path", p.Path, "problem", p.Text, "hint", p.Hint}
}
