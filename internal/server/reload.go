package server

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/filewatch"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/periodic"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
)

// The outcomes of a reload, as metrics spell them.
const (
	reloadApplied = "applied"
	reloadFailed  = "failed"  // the file has a problem, or needs a restart
	reloadRefused = "refused" // it would protect keys less
)

// reloader applies what it can of a changed configuration. Its methods are safe for concurrent use.
type reloader struct {
	path           string
	seen           [sha256.Size]byte // digest of the file when it was first loaded
	level          *slog.LevelVar
	allowWeakening bool // --allow-weakening
	log            *slog.Logger
	audit          *auditlog.Log
	count          *prometheus.CounterVec
	setRules       func([]config.Rule) error
	setClients     func(listener int, allowed, ciphertext []string) error

	mu      sync.Mutex
	running *config.Config
	inUse   [sha256.Size]byte // digest of the file that running is from

	notInUse atomic.Pointer[string] // why the file is not in use; nil if it is
}

// newReloader makes the reloader of s, which has keys and a proxy.
func newReloader(s *Server, c *config.Config, path string, loaded [sha256.Size]byte, level *slog.LevelVar, weaken bool) *reloader {
	r := &reloader{
		path: path, seen: loaded, inUse: loaded, running: c, level: level, allowWeakening: weaken, log: s.log, audit: s.audit,
		setRules: s.keys.SetRules, setClients: s.proxy.SetClients,
		count: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "etcd_kms_proxy_config_reloads_total", Help: "Reloads of the configuration. outcome: applied, failed, refused.",
		}, []string{"outcome"}),
	}
	s.registry.MustRegister(r.count)
	for _, outcome := range []string{reloadApplied, reloadFailed, reloadRefused} {
		r.count.WithLabelValues(outcome)
	}
	return r
}

// watch reloads when the content of the file changes, until ctx ends.
func (r *reloader) watch(ctx context.Context) {
	filewatch.Watch(ctx, r.path, r.seen, func() { r.reload("changed file") })
}

// auditRetry is how often a change is tried again that the audit log prevented.
const auditRetry = 5 * time.Second

// retry reloads once the audit log, which prevented a change, can be written again, until ctx ends.
func (r *reloader) retry(ctx context.Context) {
	periodic.Run(ctx, auditRetry, func() {
		if why := r.problem(); why != nil && why.Error() == auditlog.ErrUnwritable.Error() && r.audit.Refusal() == nil {
			r.reload("audit log writable")
		}
	})
}

// problem returns why the file is not in use, or nil.
func (r *reloader) problem() error {
	if why := r.notInUse.Load(); why != nil {
		return errors.New(*why)
	}
	return nil
}

// reload reads the file and applies its rules, client lists and log level, or changes nothing and
// logs why.
func (r *reloader) reload(trigger string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := filewatch.Digest(r.path) // before it is loaded, so that a later change is noticed
	outcome, reason := r.apply(trigger)
	r.notInUse.Store(nil)
	switch {
	case outcome == reloadApplied:
		r.inUse = now
	case now != r.inUse:
		r.notInUse.Store(&reason)
	}
	r.count.WithLabelValues(outcome).Inc()
	r.audit.Record(auditlog.Record{Event: auditlog.EventReload, Trigger: trigger, Outcome: outcome, Reason: reason, Config: hex.EncodeToString(now[:])})
}

// apply returns the outcome and the reason for the audit log. mu is held.
func (r *reloader) apply(trigger string) (outcome, reason string) {
	failed := func(err error, more ...any) (string, string) {
		r.log.Error("configuration not reloaded: the running one stays", append([]any{"error", err, "trigger", trigger}, more...)...)
		return reloadFailed, err.Error()
	}
	if err := r.audit.Refusal(); err != nil {
		return failed(err)
	}
	next, err := config.Load(r.path)
	if ps, ok := errors.AsType[config.Problems](err); ok {
		for _, p := range ps {
			r.log.Error("configuration not reloaded: the running one stays",
				"file", r.path, "line", p.Line, "path", p.Path, "problem", p.Text, "hint", p.Hint, "trigger", trigger)
		}
		// Without the text, which quotes the file.
		return reloadFailed, fmt.Sprintf("%s, the first on line %d", printable.Count(len(ps), "problem", "problems"), ps[0].Line)
	}
	if err != nil {
		return failed(err)
	}
	weaker := config.Weakens(r.running.Rules, next.Rules)
	if len(weaker) > 0 && !r.allowWeakening {
		r.log.Error("configuration not reloaded: it would protect keys less than the running one, which stays",
			"because", weaker, "hint", "restore the rules; or, if this is meant, restart the proxy with --allow-weakening", "trigger", trigger)
		return reloadRefused, strings.Join(weaker, "; ")
	}
	restart := config.NeedsRestart(r.running, next)
	if err := r.setRules(next.Rules); err != nil {
		return failed(err, "changed", restart, "hint", "restart the proxy to apply it")
	}
	r.level.Set(logLevel(next.Log.Level))
	// Only what was applied counts as running, so that the next reload names the rest again.
	running := *r.running
	running.Rules, running.Log.Level = next.Rules, next.Log.Level
	running.Listeners = r.applyClients(next.Listeners)
	r.running = &running
	if len(weaker) > 0 {
		r.log.Warn("configuration reloaded: it protects keys less than before, as --allow-weakening permits", "because", weaker)
	}
	if len(restart) > 0 {
		r.log.Warn("configuration reloaded in part: these blocks changed too, and need a restart", "blocks", restart)
		weaker = append(weaker, "these blocks need a restart: "+strings.Join(restart, ", "))
	}
	r.log.Info("configuration reloaded", "trigger", trigger, "rules", len(next.Rules), "logLevel", next.Log.Level)
	return reloadApplied, strings.Join(weaker, "; ")
}

// applyClients applies the client lists of the listeners, and returns the listeners as they are
// then. mu is held.
func (r *reloader) applyClients(next []config.Listener) []config.Listener {
	all := slices.Clone(r.running.Listeners)
	for i := range all {
		j := config.SameListener(all, next, i)
		if j < 0 || slices.Equal(all[i].AllowedClients, next[j].AllowedClients) && slices.Equal(all[i].CiphertextClients, next[j].CiphertextClients) {
			continue
		}
		if err := r.setClients(i, next[j].AllowedClients, next[j].CiphertextClients); err != nil {
			r.log.Error("client lists not reloaded", "error", err)
			continue
		}
		all[i].AllowedClients, all[i].CiphertextClients = next[j].AllowedClients, next[j].CiphertextClients
		r.log.Info("client lists reloaded", "listener", all[i].Address, "allowedClients", len(all[i].AllowedClients), "ciphertextClients", len(all[i].CiphertextClients))
	}
	return all
}
