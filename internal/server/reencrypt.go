package server

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/encryption"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/etcdclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/logonce"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/reencrypt"
)

// reencryptor re-encrypts values in the background of the proxy that leads.
type reencryptor struct {
	reencrypt.Loop
	fleet     *fleet
	audit     *auditlog.Log
	log       *slog.Logger
	begun     bool          // a run has begun, which is in the audit log
	logged    logonce.State // the last failure
	rewritten prometheus.Counter
	left      prometheus.Gauge
	at        prometheus.Gauge
	failures  prometheus.Counter
}

// newReencryptor makes the reencryptor of a proxy with coordination.
func newReencryptor(
	f *fleet, keys *encryption.Keys, audit *auditlog.Log, reg prometheus.Registerer, log *slog.Logger, c *config.Config, o Options,
) *reencryptor {
	r := &reencryptor{
		fleet: f, audit: audit, log: log,
		rewritten: prometheus.NewCounter(prometheus.CounterOpts{Name: "etcd_kms_proxy_reencrypted_values_total", Help: "Values in etcd that this proxy has re-encrypted in the background."}),
		left: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_reencrypt_left_values", Help: "Values in etcd that the last run of this proxy could not rewrite.",
		}),
		at: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_reencrypt_timestamp_seconds", Help: "Unix time when this proxy last finished a run over all values in etcd; 0 if it never did.",
		}),
		failures: prometheus.NewCounter(prometheus.CounterOpts{Name: "etcd_kms_proxy_reencrypt_failures_total", Help: "Runs that ended before all values were read."}),
	}
	reg.MustRegister(r.rewritten, r.left, r.at, r.failures)
	r.Loop = reencrypt.Loop{
		Interval: o.ReencryptInterval, Leader: func() bool { return f.Leads(jobReencrypt) }, Ended: r.ended,
		// The loop also checks for a restore itself, but only every few seconds. The fleet and the
		// watch see each revision, so they notice one that the loop cannot.
		Keys: func() string { return fmt.Sprint(f.restores.Load(), "\x00", keys.Version()) },
		Config: reencrypt.Config{
			Client: f.client, Rules: f.stored, Rate: o.ReencryptRate, MaxBytes: c.Etcd.MaxRequestBytes, Check: r.check, Begin: r.begin, Paused: r.paused,
			Election: coordination.Election{
				Client: f.client, Key: c.Coordination.Prefix + "reencrypt", Self: "proxy, " + etcdclient.Self(),
				Waiting: func(holder string) { log.Info("another reencrypt is at work", "holder", holder) },
			},
		},
	}
	return r
}

// check prevents a run while proxies have other rules, or while it could not be recorded.
func (r *reencryptor) check(ctx context.Context) error {
	if err := r.audit.Refusal(); err != nil {
		return err
	}
	return r.fleet.SameRules(ctx)
}

func (r *reencryptor) begin() error {
	r.begun = true
	r.log.Info("re-encrypting values in etcd")
	r.audit.Record(auditlog.Record{Event: auditlog.EventCommand, Command: "serve --reencrypt", Outcome: "begun"})
	return r.audit.Refusal()
}

func (r *reencryptor) paused(what, why string) {
	if why == "" {
		r.log.Info("re-encrypting continues", "waitedFor", what)
	} else {
		r.log.Warn("re-encrypting waits", "for", what, "reason", why)
	}
}

// ended reports a run in the metrics, the log and the audit log.
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
	default:
		r.at.SetToCurrentTime()
		r.left.Set(float64(done.Unfinished()))
		if n := done.Unfinished(); n > 0 {
			outcome, reason = "failed", printable.Count(n, "value", "values")+" could not be rewritten"
		}
	}
	if r.logged.Changed(reason) && reason != "" {
		if err != nil {
			r.log.Warn("values in etcd were not re-encrypted; the proxy tries again", "error", err)
		} else {
			r.log.Warn("values in etcd could not be re-encrypted", "left", done.Unfinished(), "first", done.Skipped[0].Key, "reason", done.Skipped[0].Why,
				"hint", "reencrypt --dry-run names them")
		}
	}
	if !r.begun {
		return
	}
	r.begun = false
	r.log.Info("re-encrypted values in etcd", "rewritten", done.Rewritten, "raced", done.Raced, "left", done.Unfinished(), "outcome", outcome,
		"duration", done.Duration.Round(time.Millisecond).String())
	r.audit.Record(auditlog.Record{Event: auditlog.EventCommand, Command: "serve --reencrypt", Outcome: outcome, Reason: reason, Keys: done.Rewritten})
}
