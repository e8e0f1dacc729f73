package server

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/adminhttp"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/buildinfo"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/coredump"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/encryption"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/filewatch"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/provider"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/readiness"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/unixsocket"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/pluginserver"
)

// PluginOptions are what the command line of kms serve-plugin says.
type PluginOptions struct {
	Provider config.KMS
	Socket   string
	Drain    time.Duration
	Warnings config.Problems // of the configuration
}

// pluginServer is a Kubernetes KMS v2 plugin with everything that it needs.
type pluginServer struct {
	log      *slog.Logger
	server   *pluginserver.Server
	registry *prometheus.Registry
	admin    *adminhttp.Server // nil if there is none
	audit    *auditlog.Log     // nil if there is none
}

// ServePlugin runs the plugin of a provider of c, which was read from the file at path, until a
// signal. Logs go to stderr.
func ServePlugin(ctx context.Context, path string, c *config.Config, stderr io.Writer, o PluginOptions) error {
	signals, release := notify(syscall.SIGTERM, syscall.SIGINT)
	defer release()
	log := printable.NewLogger(stderr, c.Log.Format, logLevel(c.Log.Level))
	if err := coredump.Forbid(); err != nil {
		log.Warn("core dumps of this process are not turned off: a dump would contain DEK seeds", "error", err)
	}
	logWarnings(log, path, o.Warnings)
	audit, err := openPluginAudit(c.Audit, o.Provider.Name, log)
	if err != nil {
		return err
	}
	defer audit.CloseLogged(log)
	b, err := provider.New(o.Provider, log)
	if err != nil {
		return fmt.Errorf("kms %q: %w", o.Provider.Name, err)
	}
	defer b.Close()
	p, err := newPluginServer(c, b, audit, log, o)
	if err != nil {
		return err
	}
	l, err := pluginserver.Listen(o.Socket)
	if err != nil {
		return socketProblem(err)
	}
	defer l.Close()
	if err := p.bindAdmin(c.Admin); err != nil {
		return startProblem(err)
	}
	warnOfFolder(log, filepath.Dir(l.Addr().String()))
	log.Info("serving", "provider", o.Provider.Name, "kind", b.Kind, "socket", l.Addr().String())
	audit.Started(buildinfo.Read().Version, filewatch.Digest(path))
	run := process{log: log, audit: audit, signals: signals, drain: o.Drain, draining: "finishing calls; a second signal exits at once"}
	var lasting []part
	if p.admin != nil {
		lasting = append(lasting, p.admin.Run)
	}
	err = run.run(ctx, func(ctx context.Context) error { return p.server.Serve(ctx, l) }, nil, lasting)
	audit.Stopped(err)
	return err
}

// openPluginAudit opens the audit log of the plugin next to that of the proxy, which c describes
// and which has one writer only. It returns nil for nil.
func openPluginAudit(c *config.Audit, provider string, log *slog.Logger) (*auditlog.Log, error) {
	if c == nil {
		return nil, nil
	}
	own := *c
	own.Path = encryption.AuditPath(own.Path, "plugin-"+url.PathEscape(provider))
	a, err := encryption.OpenAudit(&own, log)
	if errors.Is(err, auditlog.ErrInUse) {
		return nil, problem.WithHint(err, "give each plugin of the same provider its own configuration, with another audit.path")
	}
	if err != nil {
		return nil, startProblem(err)
	}
	return a, nil
}

// socketProblem adds hints to the errors of sockets.
func socketProblem(err error) error {
	switch {
	case errors.Is(err, pluginserver.ErrInUse):
		return problem.WithHint(err, "stop that process, or choose another path; every API server has a plugin of its own")
	case errors.Is(err, unixsocket.ErrNoFolder):
		return problem.WithHint(err, "make the folder first, for the API server's user alone: mkdir -m 0700")
	case errors.Is(err, fs.ErrPermission):
		return problem.WithHint(err, "check that the user of this command may write into the folder")
	}
	return err
}

// warnOfFolder logs a warning if other users could replace the socket by one of their own, which
// would be given every DEK seed.
func warnOfFolder(log *slog.Logger, dir string) {
	info, err := os.Stat(dir)
	if err == nil && info.Mode().Perm()&0o022 != 0 && info.Mode()&fs.ModeSticky == 0 {
		log.Warn("other users may write into the socket's folder: one of them could replace the socket, and receive DEK seeds from the API server",
			"folder", dir, "mode", info.Mode().String())
	}
}

// failingPoll is the longest time between polls of the KMS while they fail.
const failingPoll = 10 * time.Second

func newPluginServer(c *config.Config, b *provider.Provider, audit *auditlog.Log, log *slog.Logger, o PluginOptions) (*pluginServer, error) {
	p := &pluginServer{log: log, registry: newRegistry(), audit: audit}
	kmsCalls := provider.NewCallMetrics(p.registry)
	observe := func(call kmsclient.Call) {
		kmsCalls.Observe(call)
		audit.Record(encryption.CallRecord(call))
	}
	calls := prometheus.NewCounterVec(prometheus.CounterOpts{
		Name: "etcd_kms_proxy_plugin_calls_total", Help: "Calls of API servers to the plugin, by operation and gRPC code.",
	}, []string{"operation", "code"})
	name := o.Provider.Name
	client, err := kmsclient.New(kmsclient.Config{Name: name, Backend: b.Service, Timeout: b.Timeout, Observer: observe})
	if err != nil {
		return nil, err
	}
	poll := min(o.Provider.PollInterval, c.Cache.RevokeWithin)
	p.server, err = pluginserver.New(pluginserver.Config{
		Provider: name, KMS: encryption.AuditedService(audit, name, client), PollInterval: poll, FailingPollInterval: min(poll, failingPoll),
		SealUnreachableFor: c.Cache.SealUnreachableFor, DrainTimeout: o.Drain, Logger: log,
		Observer: func(op string, code codes.Code) { calls.WithLabelValues(op, code.String()).Inc() },
	})
	if err != nil {
		return nil, err
	}
	registerAudit(p.registry, audit)
	p.registry.MustRegister(calls, provider.States(func() []provider.State {
		s := p.server.State()
		return []provider.State{{Provider: s.Provider, Healthy: s.Healthy, LastSuccess: s.LastGood, KeyID: s.KeyID}}
	}))
	return p, nil
}

// bindAdmin binds the address of the admin server, if there is one and it is free.
func (p *pluginServer) bindAdmin(c *config.Admin) error {
	if c == nil {
		return nil
	}
	admin, err := adminhttp.New(adminhttp.Config{Address: c.Address, Gatherer: p.registry, Ready: p.ready, Pprof: c.Pprof, Logger: p.log})
	if errors.Is(err, syscall.EADDRINUSE) {
		p.log.Warn("no metrics and health of this plugin: the admin address is in use, perhaps by a proxy with the same configuration", "address", c.Address)
		return nil
	}
	if err != nil {
		return err
	}
	p.admin = admin
	p.log.Info("admin serving", "address", admin.Addr().String())
	return nil
}

// ready reports that the plugin serves, whether its KMS responds, and whether the audit log can be
// written.
func (p *pluginServer) ready() readiness.Report {
	s := p.server.State()
	checks := []readiness.Check{{Name: "kms " + s.Provider, OK: s.Healthy, Detail: s.Reason}}
	return readiness.Report{Ready: true, Checks: append(checks, auditChecks(p.audit)...)}
}

// CheckPlugin returns a problem if k cannot be served on socket.
func CheckPlugin(k config.KMS, socket string) error {
	if k.Plugin != nil && strings.TrimPrefix(k.Plugin.Endpoint, "unix://") == strings.TrimPrefix(socket, "unix://") {
		return problem.New("choose another path", "--socket %s is the socket that provider %q is itself reached at", socket, k.Name)
	}
	switch hint := "name a provider of another kind with --name"; {
	case k.Kubernetes != nil:
		return problem.New(hint, "kms %q: %w", k.Name, provider.ErrDecryptsOnly)
	case k.Age != nil:
		return problem.New(hint, "kms %q: %w", k.Name, provider.ErrWrapsOnly)
	}
	return nil
}
