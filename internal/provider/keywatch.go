package provider

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

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/logonce"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

const (
	// expiryNotice is how long before the expiry of key material the warning begins.
	expiryNotice = 30 * 24 * time.Hour
	// describeInterval is long because all callers of an account share the KMS' quota for
	// describing keys.
	describeInterval = 10 * time.Minute
	describeTimeout  = 30 * time.Second
	// flapNotice is how long the warning about a flapping key ID lasts.
	flapNotice = time.Hour
	// stateCheck is how soon the key is described after calls begin to fail or succeed again.
	stateCheck = 5 * time.Second
)

// Warning is something that will stop a key from working, or that makes its loss final.
type Warning struct {
	Kind string // the label of the metric
	Text string
}

// Warnings returns what to warn of. info is nil where the KMS does not describe its keys. late is
// when credentials end that should have been renewed, or zero. recovery says that every rule that
// writes with the key has a recovery key.
func Warnings(info *kmsclient.KeyInfo, late time.Time, recovery bool, now time.Time) []Warning {
	var ws []Warning
	add := func(kind, format string, args ...any) { ws = append(ws, Warning{kind, fmt.Sprintf(format, args...)}) }
	if info != nil {
		if !info.Usable {
			add("state", "the key's state is %s: it cannot be used", info.State)
		}
		if !info.DeleteAt.IsZero() {
			add("deletion", "the key will be deleted at %s: every value encrypted under it is lost then, unless a recovery key decrypts it", info.DeleteAt.Format(time.RFC3339))
		}
		if at := info.MaterialExpiresAt; !at.IsZero() && at.Sub(now) < expiryNotice {
			add("material_expiry", "the key's material expires at %s: import it again before", at.Format(time.RFC3339))
		}
		if info.DeletionProtection == kmsclient.Off {
			add("deletion_protection_off", "the key's deletion protection is off: turn it on to prevent its deletion by mistake")
		}
		if info.Rotation == kmsclient.Off {
			add("rotation_off", "the key's automatic rotation is off")
		}
	}
	if !recovery {
		add("no_recovery_key", "no recovery key: if this key is lost, so is every value encrypted under it; add a recovery provider to the rules that write with it")
	}
	if !late.IsZero() {
		add("credentials_expire", "the credentials end at %s and were not refreshed", late.Format(time.RFC3339))
	}
	return ws
}

// WatchConfig says which key to watch, and how.
type WatchConfig struct {
	Provider string
	Describe Describe         // nil where the KMS does not describe its keys
	Expire   func() time.Time // when the credentials end, or zero
	Late     func() time.Time // the same if they should have been renewed, else zero
	Recovery func() bool      // whether every rule that writes with the key has a recovery key
	Healthy  func() bool      // whether the last call of the KMS succeeded
	Flapped  func() time.Time // when the KMS last returned to an earlier key ID; may be nil
	Logger   *slog.Logger
}

// Watch describes a key from time to time, logs each warning when it begins and when it ends, and
// exports the warnings as metrics.
type Watch struct {
	WatchConfig
	info   atomic.Pointer[kmsclient.KeyInfo] // the last description
	logged logonce.Set                       // kinds of warnings; of look
}

// NewWatch returns a watch that [Watch.Run] starts.
func NewWatch(c WatchConfig) *Watch { return &Watch{WatchConfig: c} }

// Observed returns describe with an observer of its calls, which do not go through a
// [kmsclient.Client].
func Observed(provider string, observe func(kmsclient.Call), describe Describe) Describe {
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

// Run describes the key at intervals until ctx ends. It also does so when calls of the KMS begin to
// fail or succeed again, since the state of the key may be the reason, and when credentials become
// late, since short sessions end before the next interval.
func (w *Watch) Run(ctx context.Context) {
	check := time.NewTicker(stateCheck)
	defer check.Stop()
	for {
		healthy, late := w.Healthy(), !w.Late().IsZero()
		w.update(ctx)
		// The jitter spreads the calls of proxies that started together.
		next := time.Now().Add(describeInterval*9/10 + rand.N(describeInterval/5)) //nolint:gosec // jitter
		for w.Healthy() == healthy && w.Late().IsZero() != late && time.Now().Before(next) {
			select {
			case <-check.C:
			case <-ctx.Done():
				return
			}
		}
	}
}

func (w *Watch) update(ctx context.Context) {
	if w.Describe != nil {
		limited, cancel := context.WithTimeout(ctx, describeTimeout)
		// An error is ignored: the ring reports that the KMS does not respond, and a dedicated
		// instance describes no keys.
		if info, err := w.Describe(limited); err == nil {
			w.info.Store(info)
		}
		cancel()
	}
	var kinds []string
	texts := map[string]string{}
	for _, x := range w.warnings() {
		kinds, texts[x.Kind] = append(kinds, x.Kind), x.Text
	}
	begun, ended := w.logged.Update(kinds...)
	for _, kind := range begun {
		w.Logger.Warn("KMS key warning", "provider", w.Provider, "kind", kind, "warning", texts[kind])
	}
	for _, kind := range ended {
		w.Logger.Info("KMS key warning is over", "provider", w.Provider, "kind", kind)
	}
}

func (w *Watch) warnings() []Warning {
	now := time.Now()
	ws := Warnings(w.info.Load(), w.Late(), w.Recovery(), now)
	if w.Flapped != nil && now.Sub(w.Flapped()) < flapNotice {
		ws = append(ws, Warning{"key_id_flaps", "the KMS alternates between key IDs: the one in use is kept until the KMS reports another for an hour"})
	}
	return ws
}

var (
	warningDesc  = prometheus.NewDesc("etcd_kms_proxy_kms_key_warning", "1 while the early warning about the KMS key is present. kind: state, deletion, material_expiry, deletion_protection_off, rotation_off, no_recovery_key, credentials_expire, key_id_flaps.", []string{"provider", "kind"}, nil)
	stateDesc    = prometheus.NewDesc("etcd_kms_proxy_kms_key_state", "Always 1; the state of the key as the KMS names it, read every 10 minutes with some jitter.", []string{"provider", "state"}, nil)
	deletionDesc = prometheus.NewDesc("etcd_kms_proxy_kms_key_deletion_timestamp_seconds", "Unix time when the KMS key will be deleted.", []string{"provider"}, nil)
	materialDesc = prometheus.NewDesc("etcd_kms_proxy_kms_key_material_expiry_timestamp_seconds", "Unix time when the imported material of the KMS key expires.", []string{"provider"}, nil)
	expiryDesc   = prometheus.NewDesc("etcd_kms_proxy_kms_credentials_expiry_timestamp_seconds", "Unix time when the session for the KMS ends. The next session is fetched when a sixth of its lifetime is left, at least 5 minutes before the end.", []string{"provider"}, nil)
)

// Describe implements [prometheus.Collector].
func (Watches) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{warningDesc, stateDesc, deletionDesc, materialDesc, expiryDesc} {
		ch <- d
	}
}

// Watches exports the metrics of several watches. It implements [prometheus.Collector].
type Watches func() []*Watch

// Collect implements [prometheus.Collector].
func (all Watches) Collect(ch chan<- prometheus.Metric) {
	for _, w := range all() {
		for _, x := range w.warnings() {
			ch <- gauge(warningDesc, 1, w.Provider, x.Kind)
		}
		timestamp(ch, expiryDesc, w.Expire(), w.Provider)
		if info := w.info.Load(); info != nil {
			ch <- gauge(stateDesc, 1, w.Provider, info.State)
			timestamp(ch, deletionDesc, info.DeleteAt, w.Provider)
			timestamp(ch, materialDesc, info.MaterialExpiresAt, w.Provider)
		}
	}
}
