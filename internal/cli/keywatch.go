package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// Times of the early warnings. A key that stops working is one within soon.
const (
	soon         = 30 * 24 * time.Hour
	watchEvery   = 10 * time.Minute // KMS quotas of describing keys are shared by a whole account
	watchTimeout = 30 * time.Second
	flapNotice   = time.Hour       // after a key ID has flapped
	stateCheck   = 5 * time.Second // how soon a key that begins to fail, or no longer does, is looked at
)

// warning is something that will stop a key from working, or that will leave nothing when it does.
type warning struct {
	kind string // the metric's label
	text string
}

// keyWarnings says what to warn of. info is nil where the KMS does not describe its keys; late is when the credentials end that should have been
// renewed, and zero if all is well with them.
func keyWarnings(info *kmsclient.KeyInfo, late time.Time, recovery bool, now time.Time) []warning {
	var ws []warning
	add := func(kind, format string, args ...any) { ws = append(ws, warning{kind, fmt.Sprintf(format, args...)}) }
	if info != nil {
		if !info.Usable {
			add("state", "the key's state is %s: it cannot be used", info.State)
		}
		if !info.DeleteAt.IsZero() {
			add("deletion", "the key will be deleted at %s: every value under it is lost then, unless a recovery key opens it", info.DeleteAt.Format(time.RFC3339))
		}
		if at := info.MaterialExpiresAt; !at.IsZero() && at.Sub(now) < soon {
			add("material_expiry", "the key's material expires at %s: import it again before", at.Format(time.RFC3339))
		}
		if info.DeletionProtection == kmsclient.Off {
			add("deletion_protection_off", "the key's deletion protection is off: turn it on, so that nobody schedules its deletion by mistake")
		}
		if info.Rotation == kmsclient.Off {
			add("rotation_off", "the key's automatic rotation is off")
		}
	}
	if !recovery {
		add("no_recovery_key", "no recovery key: when this key is gone for good, so is every value under it; name another provider in recovery of the rules that write with it")
	}
	if !late.IsZero() {
		add("credentials_expire", "the credentials end at %s and were not refreshed", late.Format(time.RFC3339))
	}
	return ws
}

// keyWatch looks at a key now and then, logs each warning when it comes and when it goes, and shows them as metrics.
type keyWatch struct {
	provider string
	describe func(context.Context) (*kmsclient.KeyInfo, error) // nil where the KMS does not describe its keys
	expire   func() time.Time                                  // nil where there are no credentials
	late     func() time.Time                                  // the same if others should have followed them, else zero
	recovery func() bool                                       // whether every rule that writes with the key has a recovery key
	healthy  func() bool                                       // whether the last contact with the KMS was good
	flapped  func() time.Time                                  // when the KMS last went back to a key ID; may be nil
	log      *slog.Logger

	info atomic.Pointer[kmsclient.KeyInfo] // the last that the KMS said
	told map[string]bool                   // by kind; look's own
}

// audited has each call of describe counted and recorded as every KMS call is, and made only while it can be. It returns nil for nil.
func (a *app) audited(provider string, describe func(context.Context) (*kmsclient.KeyInfo, error)) func(context.Context) (*kmsclient.KeyInfo, error) {
	if describe == nil {
		return nil
	}
	return func(ctx context.Context) (info *kmsclient.KeyInfo, err error) {
		err = a.audit.recorded(func() error {
			info, err = observed(provider, a.kmsCall, describe)(ctx)
			return err
		})
		if err != nil {
			return nil, err
		}
		return info, nil
	}
}

// observed returns describe with an observer of its calls, which no client makes.
func observed(
	provider string, observe func(kmsclient.Call), describe func(context.Context) (*kmsclient.KeyInfo, error),
) func(context.Context) (*kmsclient.KeyInfo, error) {
	return func(ctx context.Context) (*kmsclient.KeyInfo, error) {
		noting, requestID := kmsclient.WithRequestID(ctx)
		call := kmsclient.Call{Provider: provider, Op: "DescribeKey", Class: "ok", Time: time.Now()}
		info, err := describe(noting)
		call.Duration, call.RequestID = time.Since(call.Time), requestID()
		if err != nil {
			call.Class = string(kmsclient.ClassUnavailable)
			if e, ok := errors.AsType[*kmsclient.Error](err); ok {
				call.Class, call.KeyID, call.RequestID = string(e.Class()), e.KeyID, cmp.Or(e.RequestID, call.RequestID)
			}
		} else {
			call.KeyID = info.KeyID
		}
		observe(call)
		return info, err
	}
}

// run looks now and then until ctx ends, and whenever contacts with the KMS turn good or bad, since whatever it was may be what the KMS says of
// the key, and whenever credentials become late, since short sessions end before the next look.
func (w *keyWatch) run(ctx context.Context) {
	check := time.NewTicker(stateCheck)
	defer check.Stop()
	for {
		healthy, late := w.healthy(), !w.late().IsZero()
		w.look(ctx)
		// Many proxies that started together do not ask together.
		next := time.Now().Add(watchEvery*9/10 + rand.N(watchEvery/5)) //nolint:gosec // jitter
		for w.healthy() == healthy && w.late().IsZero() != late && time.Now().Before(next) {
			select {
			case <-check.C:
			case <-ctx.Done():
				return
			}
		}
	}
}

func (w *keyWatch) look(ctx context.Context) {
	if w.describe != nil {
		limited, cancel := context.WithTimeout(ctx, watchTimeout)
		// What does not answer or may not be asked shows in the ring's own contact; a dedicated instance cannot be asked at all.
		if info, err := w.describe(limited); err == nil {
			w.info.Store(info)
		}
		cancel()
	}
	now := map[string]bool{}
	for _, x := range w.warnings() {
		now[x.kind] = true
		if !w.told[x.kind] {
			w.log.Warn("KMS key warning", "provider", w.provider, "kind", x.kind, "warning", x.text)
		}
	}
	for kind := range w.told {
		if !now[kind] {
			w.log.Info("KMS key warning is over", "provider", w.provider, "kind", kind)
		}
	}
	w.told = now
}

func (w *keyWatch) warnings() []warning {
	now := time.Now()
	ws := keyWarnings(w.info.Load(), w.late(), w.recovery(), now)
	if w.flapped != nil && now.Sub(w.flapped()) < flapNotice {
		ws = append(ws, warning{"key_id_flaps", "the KMS goes back and forth between key IDs: the one in use is kept until it names another for an hour"})
	}
	return ws
}

// keyWatches collects what the watches know when it is asked for.
type keyWatches struct{ app *app }

var (
	warningDesc  = prometheus.NewDesc("etcd_kms_proxy_kms_key_warning", "1 for each present warning about the KMS key.", []string{"provider", "kind"}, nil)
	stateDesc    = prometheus.NewDesc("etcd_kms_proxy_kms_key_state", "Always 1; the key's state in the KMS' words.", []string{"provider", "state"}, nil)
	deletionDesc = prometheus.NewDesc("etcd_kms_proxy_kms_key_deletion_seconds", "Unix time when the KMS key will be deleted.", []string{"provider"}, nil)
	materialDesc = prometheus.NewDesc("etcd_kms_proxy_kms_key_material_expiry_seconds", "Unix time when the KMS key's imported material expires.", []string{"provider"}, nil)
	expiryDesc   = prometheus.NewDesc("etcd_kms_proxy_kms_credentials_expiry_seconds", "Unix time when the present credentials for the KMS end.", []string{"provider"}, nil)
)

// Describe implements [prometheus.Collector].
func (keyWatches) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{warningDesc, stateDesc, deletionDesc, materialDesc, expiryDesc} {
		ch <- d
	}
}

// Collect implements [prometheus.Collector].
func (k keyWatches) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	at := func(d *prometheus.Desc, t time.Time, provider string) {
		if !t.IsZero() {
			gauge(d, float64(t.Unix()), provider)
		}
	}
	for _, w := range k.app.watches {
		for _, x := range w.warnings() {
			gauge(warningDesc, 1, w.provider, x.kind)
		}
		if w.expire != nil {
			at(expiryDesc, w.expire(), w.provider)
		}
		if info := w.info.Load(); info != nil {
			gauge(stateDesc, 1, w.provider, info.State)
			at(deletionDesc, info.DeleteAt, w.provider)
			at(materialDesc, info.MaterialExpiresAt, w.provider)
		}
	}
}
