package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/spf13/cobra"
	"google.golang.org/grpc/codes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/pluginserver"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

func newKMSServePlugin() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve-plugin --name PROVIDER --socket PATH",
		Short: "serve a provider as a Kubernetes KMS v2 plugin",
		Long: `serve-plugin serves a configured provider of any kind as a Kubernetes KMS v2 plugin on a unix socket, for the API server's own encryption
(--encryption-provider-config). Values that an API server writes with it, under a provider of the same name, and values that the proxy writes are
alike: either reads the other's.

Of the configuration it uses kms and log, revokeWithin and sealUnreachableFor of cache, admin, and audit: metrics and health are served there unless
the address is in use, by a proxy with the same configuration for example, and the audit log stands beside that proxy's: for audit.jsonl it is
audit.plugin-PROVIDER.jsonl. Nothing is reloaded, but key files and credential files are.

The socket's folder must exist. Only the user that the command runs as can connect (mode 0600): that must be the API server's. A socket that nobody
answers on is replaced; anything else that stands there is an error.

SIGTERM or SIGINT removes the socket, finishes calls under way, and exits with 0; what is left after --drain-timeout is cut. Another one, half a
second later or more, exits at once, with 3. Logs go to standard error. On Linux, core dumps of the process are turned off.`,
		Args: cobra.NoArgs,
	}
	path := configFlag(cmd)
	name := cmd.Flags().String("name", "", "`PROVIDER` under kms to serve")
	socket := cmd.Flags().String("socket", "", "`PATH` of the socket, as /path or unix:///path")
	drain := cmd.Flags().Duration("drain-timeout", pluginserver.DefaultDrainTimeout, "how long calls under way may take after the first SIGTERM or SIGINT")
	cmd.RunE = fails(func(cmd *cobra.Command, _ []string) error {
		switch {
		case *drain <= 0:
			return &failure{code: exitUsage, err: fmt.Errorf("--drain-timeout %v is not more than 0s", *drain)}
		case *name == "":
			return &failure{code: exitUsage, err: errors.New("--name is missing"), hint: "give the name of a provider under kms"}
		case *socket == "":
			return &failure{code: exitUsage, err: errors.New("--socket is missing"), hint: "give a path, e.g. /run/kmsplugin/socket.sock"}
		}
		return servePlugin(cmd, *path, *name, *socket, *drain)
	})
	return cmd
}

func servePlugin(cmd *cobra.Command, path, name, socket string, drain time.Duration) error {
	// From here on, a signal is answered by this command and by nothing else.
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, syscall.SIGTERM, syscall.SIGINT)
	defer signal.Stop(signals)
	signal.Ignore(syscall.SIGPIPE) // a log that nobody reads any more is no reason to end

	var warnings config.Problems
	c, err := loadForEach(cmd, path, func(p config.Problem) { warnings = append(warnings, p) })
	if err != nil {
		return err
	}
	k, err := providerCalled(c, name)
	if err != nil {
		return err
	}
	if k.Plugin != nil && strings.TrimPrefix(k.Plugin.Endpoint, "unix://") == strings.TrimPrefix(socket, "unix://") {
		return &failure{code: exitUsage, err: fmt.Errorf("--socket %s is the socket that provider %q is itself reached at", socket, name), hint: "choose another path"}
	}
	if k.Kubernetes != nil {
		return &failure{code: exitUsage, err: fmt.Errorf("kms %q: %w", name, errReadsOnly), hint: "name a provider of another kind with --name"}
	}
	log := newLogger(cmd.ErrOrStderr(), c.Log.Format, logLevel(c.Log.Level))
	if err := forbidDumps(); err != nil {
		log.Warn("core dumps of this process are not turned off: one would hold seeds", "error", err)
	}
	warnOf(log, path, warnings)
	a, err := newPluginAuditor(c.Audit, name, log)
	if err != nil {
		return err
	}
	defer a.close(log)
	b, err := newBackend(k, log)
	if err != nil {
		return fmt.Errorf("kms %q: %w", name, err)
	}
	defer b.close()
	p, err := newPluginServer(c, k, b, a, drain, log)
	if err != nil {
		return err
	}
	l, err := pluginserver.Listen(socket)
	if err != nil {
		return socketFailure(err)
	}
	defer l.Close()
	if err := p.bindAdmin(c.Admin); err != nil {
		return startFailure(err)
	}
	warnOfFolder(log, filepath.Dir(l.Addr().String()))
	log.Info("serving", "provider", name, "kind", b.kind, "socket", l.Addr().String())
	a.started(digest(path))
	err = p.run(cmd.Context(), func(ctx context.Context) error { return p.server.Serve(ctx, l) }, signals, drain)
	a.stopped(err)
	if err == nil {
		log.Info("stopped")
	}
	return err
}

// newPluginAuditor opens the log of the plugin for a provider, beside the one of c, which may be nil. close must follow.
func newPluginAuditor(c *config.Audit, provider string, log *slog.Logger) (*auditor, error) {
	if c == nil {
		return nil, nil
	}
	own := *c
	own.Path = besideAudit(own.Path, "plugin-"+url.PathEscape(provider))
	a, err := newAuditor(&own, log)
	if errors.Is(err, auditlog.ErrInUse) {
		return nil, &failure{code: exitFailure, err: err, hint: "give each plugin of the same provider a configuration of its own, with another audit.path"}
	}
	if err != nil {
		return nil, startFailure(err)
	}
	return a, nil
}

func providerCalled(c *config.Config, name string) (config.KMS, error) {
	names := make([]string, len(c.KMS))
	for i, k := range c.KMS {
		if k.Name == name {
			return k, nil
		}
		names[i] = k.Name
	}
	if len(names) == 0 {
		return config.KMS{}, &failure{code: exitFailure, err: errors.New("no KMS is configured"), hint: "add one under kms"}
	}
	slices.Sort(names)
	return config.KMS{}, &failure{
		code: exitUsage, err: fmt.Errorf("no KMS provider is called %q", name), hint: "the configuration has " + strings.Join(names, ", "),
	}
}

// socketFailure adds what to do to the errors of sockets.
func socketFailure(err error) error {
	f := &failure{code: exitFailure, err: err}
	switch {
	case errors.Is(err, pluginserver.ErrInUse):
		f.hint = "stop that process, or choose another path; every API server has a plugin of its own"
	case errors.Is(err, fs.ErrNotExist):
		f.hint = "make the folder first, for the API server's user alone: mkdir -m 0700"
	case errors.Is(err, fs.ErrPermission):
		f.hint = "check that the user the command runs as may write into the folder"
	}
	return f
}

// warnOfFolder says so where others could put a socket of their own in the place of this one: they would be given every seed.
func warnOfFolder(log *slog.Logger, dir string) {
	info, err := os.Stat(dir)
	if err == nil && info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0 {
		log.Warn("other users may write into the socket's folder: one could answer the API server in place of this plugin, and learn its seeds",
			"folder", dir, "mode", info.Mode().String())
	}
}

// failingPoll is the longest time between contacts while something is wrong.
const failingPoll = 10 * time.Second

// pluginServer is everything that serve-plugin runs.
type pluginServer struct {
	log      *slog.Logger
	server   *pluginserver.Server
	registry *prometheus.Registry
	admin    *proxy.Admin // nil where there is none
	audit    *auditor     // nil where there is none
}

func newPluginServer(c *config.Config, k config.KMS, b *backend, a *auditor, drain time.Duration, log *slog.Logger) (*pluginServer, error) {
	told := &app{audit: a} // of KMS calls, as that of a proxy is
	m := newMetrics(told)
	told.metrics = m
	calls := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "etcd_kms_proxy_plugin_calls_total", Help: "Calls of API servers to the plugin, by operation and gRPC code.",
	}, []string{"operation", "code"})
	client, err := kmsclient.New(kmsclient.Config{Name: k.Name, Backend: b.service, Timeout: b.timeout, Observer: told.kmsCall})
	if err != nil {
		return nil, err
	}
	p := &pluginServer{log: log, registry: prometheus.NewRegistry(), audit: a}
	poll := min(k.PollInterval, c.Cache.RevokeWithin)
	p.server, err = pluginserver.New(pluginserver.Config{
		Provider: k.Name, KMS: a.kms(k.Name, client), PollInterval: poll, FailingPollInterval: min(poll, failingPoll),
		SealUnreachableFor: c.Cache.SealUnreachableFor, DrainTimeout: drain, Logger: log,
		Observer: func(op string, code codes.Code) { calls.WithLabelValues(op, code.String()).Inc() },
	})
	if err != nil {
		return nil, err
	}
	a.register(p.registry)
	p.registry.MustRegister(m.operations, m.latency, calls, pluginState{p.server},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return p, nil
}

// bindAdmin binds the admin server's address, if there is one that is free.
func (p *pluginServer) bindAdmin(c *config.Admin) error {
	if c == nil {
		return nil
	}
	admin, err := proxy.NewAdmin(proxy.AdminConfig{Address: c.Address, Gatherer: p.registry, Ready: p.ready, Pprof: c.Pprof, Logger: p.log})
	if errors.Is(err, syscall.EADDRINUSE) {
		p.log.Warn("no metrics and health of this plugin: the admin address is in use, by a proxy with the same configuration perhaps", "address", c.Address)
		return nil
	}
	if err != nil {
		return err
	}
	p.admin = admin
	p.log.Info("admin serving", "address", admin.Addr().String())
	return nil
}

// ready reports that the plugin serves, whether its KMS answers, and whether the audit log can be written.
func (p *pluginServer) ready() proxy.ReadyReport {
	s := p.server.State()
	checks := []proxy.Check{{Name: "kms " + s.Provider, OK: s.Healthy, Detail: s.Reason}}
	return proxy.ReadyReport{Ready: true, Checks: append(checks, p.audit.ready()...)}
}

// run serves until a signal, a failure or the end of ctx. The admin server stops last.
func (p *pluginServer) run(ctx context.Context, serve func(context.Context) error, signals <-chan os.Signal, drain time.Duration) error {
	serving, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	lasting, end := context.WithCancel(context.WithoutCancel(ctx))
	var rest sync.WaitGroup
	defer rest.Wait()
	defer end()
	if p.admin != nil {
		rest.Go(func() {
			if err := p.admin.Run(lasting); err != nil {
				stop(err)
			}
		})
	}
	rest.Go(func() { p.obey(lasting, signals, func() { stop(nil) }, drain) })
	err := serve(serving)
	if cause := context.Cause(serving); err == nil && cause != nil && !errors.Is(cause, context.Canceled) {
		err = cause
	}
	return err
}

// obey answers signals until ctx ends.
func (p *pluginServer) obey(ctx context.Context, signals <-chan os.Signal, stop func(), drain time.Duration) {
	var stopping time.Time // when the first signal came
	for {
		select {
		case <-ctx.Done():
			return
		case s := <-signals:
			switch {
			case stopping.IsZero():
				stopping = time.Now()
				p.log.Info("finishing calls; a second signal exits at once", "signal", s.String(), "drainTimeout", drain.String())
				stop()
			case time.Since(stopping) < echo:
			default:
				p.log.Warn("second signal: exiting at once", "signal", s.String())
				p.audit.stopped(errSecondSignal)
				os.Exit(exitFailure)
			}
		}
	}
}
