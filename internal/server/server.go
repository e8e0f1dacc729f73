// Package server composes the long-running commands: [Serve] makes the proxy of a configuration
// with its keys, its admin server, its audit log and its coordination with other proxies, and
// [ServePlugin] the Kubernetes KMS plugin. Both run until a signal. The package contains the wiring
// and the reload of the configuration; the work is done by the packages that it composes.
package server

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/adminhttp"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/buildinfo"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/encryption"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/etcdclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/filewatch"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/memlimit"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/readiness"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

// Options are what the command line of serve says.
type Options struct {
	Drain          time.Duration
	AllowWeakening bool
	ScanInterval   time.Duration // 0: the proxy does not scan

	ReencryptInterval time.Duration // 0: the proxy does not re-encrypt
	ReencryptRate     float64       // values a second; 0 is unlimited

	sockets sockets // from systemd
}

// The jobs that one of the proxies does for all.
const (
	jobScan      = "scan"
	jobReencrypt = "reencrypt"
)

// jobs returns the jobs that this proxy does if it is elected.
func (o *Options) jobs() (jobs []string) {
	if o.ScanInterval > 0 {
		jobs = append(jobs, jobScan)
	}
	if o.ReencryptInterval > 0 {
		jobs = append(jobs, jobReencrypt)
	}
	return jobs
}

// Server is a proxy with everything that it needs.
type Server struct {
	log       *slog.Logger
	registry  *prometheus.Registry
	audit     *auditlog.Log // nil without an audit block
	keys      *encryption.Keys
	fleet     *fleet
	scanner   *scanner     // nil without --scan-interval
	reencrypt *reencryptor // nil without --reencrypt
	proxy     *proxy.Proxy
	admin     *adminhttp.Server // nil without an admin block
	reloader  *reloader
	drain     time.Duration
}

// Load reads the configuration, with all checks. Warnings are passed to warn.
type Load func(warn func(config.Problem)) (*config.Config, error)

// Serve runs the proxy of the configuration file at path until a signal. Logs go to stderr.
func Serve(ctx context.Context, path string, load Load, stderr io.Writer, o Options) error {
	signals, release := notify(syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	defer release()
	loaded := filewatch.Digest(path) // first, so that a change during the start is noticed
	var warnings config.Problems
	c, err := load(func(p config.Problem) { warnings = append(warnings, p) })
	if err != nil {
		return err
	}
	level := new(slog.LevelVar)
	level.Set(logLevel(c.Log.Level))
	log := printable.NewLogger(stderr, c.Log.Format, level)
	logWarnings(log, path, warnings)
	memlimit.SetGrowth()
	if limit := memlimit.Set(); limit > 0 {
		log.Info("memory limit set from the cgroup", "bytes", limit)
	}
	if o.sockets, err = inheritedSockets(); err != nil {
		return err
	}
	if err := o.sockets.check(c.Listeners); err != nil {
		o.sockets.close()
		return err
	}
	s, err := New(c, path, loaded, log, level, o)
	if err != nil {
		return startProblem(err)
	}
	defer s.Close()
	s.logStart(c)
	s.audit.Started(buildinfo.Read().Version, loaded)
	err = s.Run(ctx, signals)
	s.audit.Stopped(err)
	return err
}

// notify returns the signals, which have no other effect until release is called. A log that nobody
// reads any more does not end the process.
func notify(which ...os.Signal) (signals <-chan os.Signal, release func()) {
	c := make(chan os.Signal, 4)
	signal.Notify(c, which...)
	signal.Ignore(syscall.SIGPIPE)
	return c, func() { signal.Stop(c) }
}

// New makes the server of a configuration and binds its addresses. It starts nothing. path and
// loaded are the configuration file and its digest, level is the level of log. [Server.Close] must
// follow.
func New(c *config.Config, path string, loaded [32]byte, log *slog.Logger, level *slog.LevelVar, o Options) (_ *Server, err error) {
	s := &Server{log: log, registry: newRegistry(), drain: o.Drain}
	defer func() {
		if err != nil {
			s.Close()
		}
	}()
	if s.audit, err = encryption.OpenAudit(c.Audit, log); err != nil {
		return nil, startProblem(err)
	}
	registerAudit(s.registry, s.audit)
	s.keys, err = encryption.New(encryption.Config{Config: c, Audit: s.audit, Registry: s.registry, Logger: log})
	if err != nil {
		return nil, err
	}
	if s.fleet, err = newFleet(c, s.keys, s.audit, s.registry, log, o); err != nil {
		return nil, err
	}
	pc := proxyConfig(c, o)
	pc.Rules, pc.Logger, pc.Registerer, pc.OnDenied = s.keys.Rules().ForProxy(), log, s.registry, s.denied
	pc.Gate, pc.LearnerGate = s.fleet.gate, s.fleet.learnerGate
	if s.proxy, err = proxy.New(pc); err != nil {
		return nil, err
	}
	s.keys.Follow(encryption.Follower{Revision: s.fleet.revision, Apply: s.apply})
	s.reloader = newReloader(s, c, path, loaded, level, o.AllowWeakening)
	if c.Admin != nil {
		s.admin, err = adminhttp.New(adminhttp.Config{Address: c.Admin.Address, Gatherer: s.registry, Ready: s.ready, Pprof: c.Admin.Pprof, Logger: log})
		if err != nil {
			return nil, err
		}
	}
	if o.ScanInterval > 0 {
		if !c.Coordination.Enabled {
			return nil, problem.New("set coordination.enabled: true, by which the proxies choose the one that scans", "--scan-interval needs coordination.enabled")
		}
		s.scanner = newScanner(s.fleet, s.registry, log, o.ScanInterval)
	}
	if o.ReencryptInterval > 0 {
		if !c.Coordination.Enabled {
			return nil, problem.New("set coordination.enabled: true, by which the proxies choose the one that re-encrypts, and know that all can decrypt the values",
				"--reencrypt needs coordination.enabled")
		}
		s.reencrypt = newReencryptor(s.fleet, s.keys, s.audit, s.registry, log, c, o)
	}
	return s, nil
}

func (s *Server) denied(listener, client, remote string) {
	s.audit.Record(auditlog.Record{Event: auditlog.EventDenied, Listener: listener, Client: client, Remote: remote})
}

// apply puts rules in force.
func (s *Server) apply(set *encryption.RuleSet) error {
	if err := s.proxy.SetRules(set.ForProxy()); err != nil {
		return err
	}
	s.fleet.setRules(set.Config())
	return nil
}

// logStart says where the proxy listens, and what is unsafe. Whether it serves is for the guard to
// decide.
func (s *Server) logStart(c *config.Config) {
	for i, addr := range s.proxy.Addrs() {
		s.log.Info("listening", "listener", c.Listeners[i].Address, "address", addr.String(), "tls", c.Listeners[i].TLS != nil)
		if c.Listeners[i].InsecurePlaintext {
			s.log.Warn("insecurePlaintext: connections of this listener are not encrypted", "listener", c.Listeners[i].Address)
		}
	}
	if s.admin != nil {
		s.log.Info("admin serving", "address", s.admin.Addr().String())
	}
	if len(c.Rules) == 0 {
		s.log.Warn("there are no rules: no value is encrypted")
	}
}

// Registry returns the registry with all metrics.
func (s *Server) Registry() *prometheus.Registry { return s.registry }

// Run serves until a signal, a failure or the end of ctx.
func (s *Server) Run(ctx context.Context, signals <-chan os.Signal) error {
	p := process{
		log: s.log, audit: s.audit, signals: signals, drain: s.drain, draining: "draining; a second signal exits at once",
		hangup: func() { s.keys.CheckNow(); s.reloader.reload("SIGHUP") },
	}
	lasting := []part{s.keys.Run, s.fleet.guard.Run, infallible(s.fleet.watchPassword), infallible(s.watchdog)}
	serving := []part{s.fleet.run, infallible(s.reloader.watch), infallible(s.reloader.retry), infallible(s.announce)}
	if s.admin != nil {
		lasting = append(lasting, s.admin.Run)
	}
	if s.scanner != nil {
		serving = append(serving, infallible(s.scanner.run))
	}
	if s.reencrypt != nil {
		serving = append(serving, infallible(s.reencrypt.Run))
	}
	return p.run(ctx, s.proxy.Run, serving, lasting)
}

// Close releases what New made, for a server that was not run or has ended.
func (s *Server) Close() {
	if s.proxy != nil {
		s.proxy.Close()
	}
	if s.fleet != nil {
		s.fleet.close()
	}
	if s.admin != nil {
		s.admin.Close()
	}
	if s.keys != nil {
		s.keys.Close()
	}
	s.audit.CloseLogged(s.log) // last: the end of the others may be recorded
}

// ready reports whether the proxy serves, and which providers and rules do not work. The proxy
// stays ready for the rest.
func (s *Server) ready() readiness.Report {
	report := s.proxy.Ready()
	for _, checks := range [][]readiness.Check{s.keys.ProviderChecks(), s.fileChecks(), auditChecks(s.audit), s.fleet.ready(), s.keys.RuleChecks()} {
		report.Checks = append(report.Checks, checks...)
	}
	return report
}

// fileChecks returns the lines about files that are not those of providers.
func (s *Server) fileChecks() []readiness.Check {
	checks := []readiness.Check{encryption.FileCheck("configuration", s.reloader.problem())}
	if s.fleet.password != nil {
		s.fleet.password.Get()
		checks = append(checks, encryption.FileCheck("etcd.passwordFile", s.fleet.password.Problem()))
	}
	return checks
}

func proxyConfig(c *config.Config, o Options) proxy.Config {
	pc := proxy.Config{
		Upstream:        etcdclient.Upstream(&c.Etcd),
		MaxRequestBytes: c.Etcd.MaxRequestBytes,
		DrainTimeout:    o.Drain,
	}
	if c.Coordination.Enabled {
		pc.OwnPrefixes = encryption.OwnPrefixes(c)
	}
	for _, l := range c.Listeners {
		lc := proxy.ListenerConfig{
			Address: l.Address, Mode: l.FileMode(), TLS: (*proxy.ListenerTLS)(l.TLS), AllowedClients: l.AllowedClients, CiphertextClients: l.CiphertextClients,
			AdvertiseClientURLs: l.AdvertiseClientURLs, Endpoint: l.Endpoint, NoGateway: !l.Gateway,
		}
		if name, ok := l.SystemdName(); ok {
			lc.Sockets = o.sockets[name]
		}
		pc.Listeners = append(pc.Listeners, lc)
	}
	return pc
}

// startProblem adds hints to the errors of a start that operators meet most.
func startProblem(err error) error {
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return problem.WithHint(err, "another process listens there: stop it, or choose another address under listeners or admin")
	case errors.Is(err, syscall.EADDRNOTAVAIL):
		return problem.WithHint(err, "this machine has no such address: choose another under listeners or admin")
	case errors.Is(err, proxy.ErrNoFolder):
		return problem.WithHint(err, "create it for the user of the proxy, also at each boot if it is below /run (systemd: RuntimeDirectory=); or choose another address under listeners")
	case errors.Is(err, auditlog.ErrInUse):
		return problem.WithHint(err, "is a proxy with this configuration running? a second one needs another audit.path")
	case errors.Is(err, os.ErrPermission):
		return problem.WithHint(err, "check that the user of the proxy may use this file, folder or port")
	}
	return err
}

func logLevel(name string) slog.Level {
	var l slog.Level
	_ = l.UnmarshalText([]byte(name)) // checked by config; the zero value is info
	return l
}

// logWarnings logs the warnings about a configuration.
func logWarnings(log *slog.Logger, path string, warnings config.Problems) {
	for _, p := range warnings {
		log.Warn("configuration: "+p.Text, "file", path, "line", p.Line, "path", p.Path, "hint", p.Hint)
	}
}
