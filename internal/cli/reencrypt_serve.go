package cli

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/reencrypt"
)

// sealsWith identifies what values are sealed with now: the rules, and each provider's key.
func (a *app) sealsWith() string {
	parts := []string{fmt.Sprintf("%p", a.rules.Load())}
	for _, ring := range a.rings {
		s := ring.State()
		parts = append(parts, s.Provider, s.KeyID, s.SealedBy)
	}
	return strings.Join(parts, "\x00")
}

// reencryptor re-encrypts in the background of a proxy, of those before an etcd on the one that leads.
type reencryptor struct {
	reencrypt.Loop
	app       *app
	begun     bool   // and in the audit log
	told      string // the last failure that was logged
	rewritten prometheus.Counter
	left      prometheus.Gauge
	at        prometheus.Gauge
	failures  prometheus.Counter
}

// newReencryptor makes the reencryptor of a proxy that has a fleet.
func newReencryptor(a *app, c *config.Config, interval time.Duration, rate float64) *reencryptor {
	r := &reencryptor{
		app:       a,
		rewritten: prometheus.NewCounter(prometheus.CounterOpts{Name: "etcd_kms_proxy_reencrypted_values_total", Help: "Values in etcd that this proxy has rewritten on its own."}),
		left: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_reencrypt_left_values", Help: "Values in etcd that the last run of this proxy could not rewrite.",
		}),
		at: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_reencrypt_seconds", Help: "Unix time when this proxy last finished looking at all values in etcd; 0 if it never did.",
		}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{Name: "etcd_kms_proxy_reencrypt_failures_total", Help: "Runs that ended before all values were looked at."}),
	}
	a.metrics.registry.MustRegister(r.rewritten, r.left, r.at, r.failures)
	r.Loop = reencrypt.Loop{
		Interval: interval, Keys: a.sealsWith, Leader: a.fleet.Leader, Ended: r.ended,
		Config: reencrypt.Config{
			Client: a.fleet.client, Rules: a.fleet.rules, Rate: rate, MaxBytes: c.Etcd.MaxRequestBytes, Check: r.check, Begin: r.begin, Paused: r.paused,
			Election: coordination.Election{
				Client: a.fleet.client, Key: c.Coordination.Prefix + "reencrypt", Self: "proxy, " + thisProcess(),
				Waiting: func(holder string) { a.log.Info("another reencrypt is at work", "holder", holder) },
			},
		},
	}
	return r
}

// check holds a run back while proxies have other rules, or while it could not be recorded.
func (r *reencryptor) check(ctx context.Context) error {
	if err := r.app.audit.refusal(); err != nil {
		return err
	}
	return r.app.fleet.SameRules(ctx)
}

func (r *reencryptor) begin() error {
	r.begun = true
	r.app.log.Info("re-encrypting values in etcd")
	r.app.audit.record(auditlog.Record{Event: auditlog.EventCommand, Command: "serve --reencrypt", Outcome: "begun"})
	return r.app.audit.refusal()
}

func (r *reencryptor) paused(what, why string) {
	if why == "" {
		r.app.log.Info("re-encrypting goes on", "waitedFor", what)
	} else {
		r.app.log.Warn("re-encrypting waits", "for", what, "reason", why)
	}
}

// ended tells the metrics, the log and the audit log of a run.
func (r *reencryptor) ended(done reencrypt.Result, err error) {
	r.rewritten.Add(float64(done.Rewritten))
	interrupted := errors.Is(err, context.Canceled)
	outcome, reason := "ok", ""
	switch {
	case interrupted:
		outcome = "interrupted"
	case err != nil:
		outcome, reason = "failed", err.Error()
		r.failures.Inc()
		if r.told != reason {
			r.app.log.Warn("values in etcd were not re-encrypted; it is tried again", "error", err)
		}
	default:
		r.at.SetToCurrentTime()
		r.left.Set(float64(done.Unfinished()))
		if n := done.Unfinished(); n > 0 {
			outcome, reason = "failed", fmt.Sprintf("%d values could not be rewritten", n)
			if r.told != reason {
				r.app.log.Warn("values in etcd could not be re-encrypted", "left", n, "first", done.Skipped[0].Key, "reason", done.Skipped[0].Why, "hint", "reencrypt --dry-run names them")
			}
		}
	}
	r.told = reason
	if !r.begun {
		return
	}
	r.begun = false
	r.app.log.Info("re-encrypted values in etcd", "rewritten", done.Rewritten, "raced", done.Raced, "left", done.Unfinished(), "outcome", outcome,
		"duration", done.Duration.Round(time.Millisecond).String())
	r.app.audit.record(auditlog.Record{Event: auditlog.EventCommand, Command: "serve --reencrypt", Outcome: outcome, Reason: reason, Keys: done.Rewritten})
}
