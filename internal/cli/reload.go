package cli

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
)

// The outcomes of a reload, as metrics spell them.
const (
	reloadApplied = "applied"
	reloadFailed  = "failed"  // the file is wrong, or needs what only a restart gives
	reloadRefused = "refused" // it would protect keys less
)

// reloader applies what it can of a changed configuration. Its methods are safe for concurrent use.
type reloader struct {
	path   string
	seen   [sha256.Size]byte // digest of the file when it was loaded first
	app    *app
	level  *slog.LevelVar
	weaken bool // --allow-weakening
	log    *slog.Logger

	mu      sync.Mutex
	running *config.Config
	inUse   [sha256.Size]byte // digest of the file that running is from

	kept atomic.Pointer[string] // why the file is not in use; nil if it is
}

// problem says why the file is not in use.
func (r *reloader) problem() error {
	if why := r.kept.Load(); why != nil {
		return errors.New(*why)
	}
	return nil
}

// reload reads the file and applies its rules and log level, or leaves everything as it is and says why.
func (r *reloader) reload(trigger string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := digest(r.path) // before it is loaded: a change in between is seen as one
	outcome, reason := r.apply(trigger)
	r.kept.Store(nil)
	switch {
	case outcome == reloadApplied:
		r.inUse = now
	case now != r.inUse: // else nothing waits to be used
		r.kept.Store(&reason)
	}
	r.app.metrics.reloads.WithLabelValues(outcome).Inc()
	r.app.audit.reloaded(trigger, outcome, reason, now)
}

// apply returns the outcome and, for the audit log, why. mu is held.
func (r *reloader) apply(trigger string) (outcome, reason string) {
	const kept = "configuration not reloaded: the running one stays"
	if err := r.app.audit.refusal(); err != nil {
		r.log.Error(kept, "error", err, "trigger", trigger)
		return reloadFailed, err.Error()
	}
	next, err := config.Load(r.path)
	if ps, ok := errors.AsType[config.Problems](err); ok {
		for _, p := range ps {
			r.log.Error(kept, append(problemAttrs(r.path, p), "trigger", trigger)...)
		}
		// Where it is wrong, and not what stands there.
		return reloadFailed, fmt.Sprintf("%d problem(s), the first on line %d", len(ps), ps[0].Line)
	}
	if err != nil {
		r.log.Error(kept, "error", err, "trigger", trigger)
		return reloadFailed, err.Error()
	}
	weaker := config.Weakens(r.running.Rules, next.Rules)
	if len(weaker) > 0 && !r.weaken {
		r.log.Error("configuration not reloaded: it would protect keys less than the running one, which stays",
			"because", weaker, "hint", "restore the rules; or, if this is meant, restart the proxy with --allow-weakening", "trigger", trigger)
		return reloadRefused, strings.Join(weaker, "; ")
	}
	restart := config.NeedsRestart(r.running, next)
	if err := r.app.setRules(next.Rules); err != nil {
		r.log.Error(kept, "error", err, "changed", restart, "hint", "restart the proxy to apply it", "trigger", trigger)
		return reloadFailed, err.Error()
	}
	r.level.Set(logLevel(next.Log.Level))
	// Only what was applied counts as running, so that the rest is named again at the next reload.
	running := *r.running
	running.Rules, running.Log.Level = next.Rules, next.Log.Level
	running.Listeners = r.setClients(next.Listeners)
	r.running = &running
	if len(weaker) > 0 {
		r.log.Warn("configuration reloaded: it protects keys less than before, as --allow-weakening lets it", "because", weaker)
	}
	if len(restart) > 0 {
		r.log.Warn("configuration reloaded in part: these blocks changed too, and wait for a restart", "blocks", restart)
	}
	r.log.Info("configuration reloaded", "trigger", trigger, "rules", len(next.Rules), "logLevel", next.Log.Level)
	if len(restart) > 0 {
		weaker = append(weaker, "these blocks wait for a restart: "+strings.Join(restart, ", "))
	}
	return reloadApplied, strings.Join(weaker, "; ")
}

// setClients applies the listeners' client lists, and returns the listeners as they then are. mu is held.
func (r *reloader) setClients(next []config.Listener) []config.Listener {
	all := slices.Clone(r.running.Listeners)
	for i := range all {
		j := config.SameListener(all, next, i)
		if j < 0 || slices.Equal(all[i].AllowedClients, next[j].AllowedClients) && slices.Equal(all[i].CiphertextClients, next[j].CiphertextClients) {
			continue
		}
		if err := r.app.proxy.SetClients(i, next[j].AllowedClients, next[j].CiphertextClients); err != nil {
			r.log.Error("client lists not reloaded", "error", err)
			continue
		}
		all[i].AllowedClients, all[i].CiphertextClients = next[j].AllowedClients, next[j].CiphertextClients
		r.log.Info("client lists reloaded", "listener", all[i].Address, "allowedClients", len(all[i].AllowedClients), "ciphertextClients", len(all[i].CiphertextClients))
	}
	return all
}

// auditRetry is how often a change is tried again that the audit log kept from being applied.
const auditRetry = 5 * time.Second

// retry reloads once the audit log, which kept a change from being applied, can be written, until ctx ends.
func (r *reloader) retry(ctx context.Context) {
	tick := time.NewTicker(auditRetry)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			if why := r.problem(); why != nil && why.Error() == errAudit.Error() && r.app.audit.refusal() == nil {
				r.reload("audit log writable")
			}
		}
	}
}

// watch reloads when the file's content has changed, until ctx ends.
func (r *reloader) watch(ctx context.Context) {
	watchFile(ctx, r.path, r.seen, r.log, "the configuration file is not watched: only SIGHUP reloads it", func() { r.reload("changed file") })
}
