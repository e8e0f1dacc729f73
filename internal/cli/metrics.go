package cli

import (
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient"
)

// metrics are the figures of rules and keys; the proxy adds its own to the same registry. No label ever holds an etcd key: rules are named
// by their prefix.
type metrics struct {
	registry       *prometheus.Registry
	sealed, opened *prometheus.CounterVec
	seeds          *prometheus.CounterVec
	recoveries     *prometheus.CounterVec
	operations     *prometheus.CounterVec
	latency        *prometheus.HistogramVec
	reloads        *prometheus.CounterVec
	app            *app // whose figures are shown, and whose audit log is told of recoveries
}

func newMetrics(a *app) *metrics {
	m := &metrics{
		app: a, registry: prometheus.NewRegistry(),
		sealed: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "etcd_kms_proxy_values_sealed_total", Help: "Values written, by rule and outcome.",
		}, []string{"rule", "outcome"}),
		opened: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "etcd_kms_proxy_values_opened_total", Help: "Values read, by rule and outcome.",
		}, []string{"rule", "outcome"}),
		seeds: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "etcd_kms_proxy_seed_events_total", Help: "Events of a provider's seeds: cache hits, misses and stale uses, mints, revocations, contacts that turned good or bad.",
		}, []string{"provider", "event"}),
		recoveries: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "etcd_kms_proxy_recovery_uses_total", Help: "Values opened by a recovery copy of their seed, by their provider and the copy's.",
		}, []string{"provider", "recovery_provider"}),
		operations: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "etcd_kms_proxy_kms_operations_total", Help: "KMS calls, by provider, operation and class of error, or ok.",
		}, []string{"provider", "operation", "class"}),
		latency: prometheus.NewHistogramVec(prometheus.HistogramOpts{
			Name: "etcd_kms_proxy_kms_operation_duration_seconds", Help: "Time of KMS calls, by provider, operation and class of error, or ok.",
			Buckets:                     []float64{.001, .0025, .005, .01, .025, .05, .1, .25, .5, 1, 2.5, 5, 10},
			NativeHistogramBucketFactor: 1.1, NativeHistogramMaxBucketNumber: 100, NativeHistogramMinResetDuration: time.Hour,
		}, []string{"provider", "operation", "class"}),
		reloads: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "etcd_kms_proxy_config_reloads_total", Help: "Reloads of the configuration, by outcome.",
		}, []string{"outcome"}),
	}
	build := readBuildInfo()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "etcd_kms_proxy_build_info", Help: "Always 1; what this binary was built from.",
		ConstLabels: prometheus.Labels{"version": build.Version, "commit": build.Commit, "go": build.Go},
	})
	info.Set(1)
	cached := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "etcd_kms_proxy_seed_cache_entries", Help: "Unwrapped seeds in the cache.",
	}, func() float64 { return float64(a.cache.Len()) })
	m.registry.MustRegister(m.sealed, m.opened, m.seeds, m.recoveries, m.operations, m.latency, m.reloads, info, cached, keyStates{a}, keyWatches{a},
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	for _, outcome := range []string{reloadApplied, reloadFailed, reloadRefused} {
		m.reloads.WithLabelValues(outcome)
	}
	return m
}

// kmsCall observes one call of a KMS client.
func (m *metrics) kmsCall(c kmsclient.Call) {
	m.operations.WithLabelValues(c.Provider, c.Op, c.Class).Inc()
	histogram, seconds := m.latency.WithLabelValues(c.Provider, c.Op, c.Class), c.Duration.Seconds()
	if with, ok := histogram.(prometheus.ExemplarObserver); ok && isExemplar(c.RequestID) {
		with.ObserveWithExemplar(seconds, prometheus.Labels{exemplarLabel: c.RequestID})
		return
	}
	histogram.Observe(seconds)
}

// exemplarLabel is the label of exemplars that holds the KMS' own ID of a call.
const exemplarLabel = "request_id"

// isExemplar reports whether the KMS' ID of a call can be an exemplar: it is the KMS' text, whatever it is.
func isExemplar(requestID string) bool {
	return requestID != "" && utf8.ValidString(requestID) && utf8.RuneCountInString(exemplarLabel+requestID) <= prometheus.ExemplarMaxRunes
}

// expectRecoveries has the counters of uses of recovery copies begin at 0: an increase from a counter
// that was not there is none to Prometheus. Any provider of a rule may open what another one cannot.
func (m *metrics) expectRecoveries(a *app, rules []config.Rule) {
	for _, r := range rules {
		names := slices.Concat([]string{r.WriteWith}, r.ReadWith, r.Recovery)
		for _, provider := range names {
			for _, by := range names {
				if provider != by && a.ring(provider) != nil && a.ring(by) != nil {
					m.recoveries.WithLabelValues(provider, by)
				}
			}
		}
	}
}

// counters are the counters of one rule or provider, found before they are needed: they are counted on the data path, where a look-up by
// label would cost more than the cipher.
type counters struct {
	sealed, opened map[keyring.Outcome]prometheus.Counter
	seeds          map[keyring.Event]prometheus.Counter
	all            *metrics
}

var _ keyring.Observer = (*counters)(nil)

// Sealed implements [keyring.Observer].
func (c *counters) Sealed(_ string, o keyring.Outcome) { c.sealed[o].Inc() }

// Opened implements [keyring.Observer].
func (c *counters) Opened(_ string, o keyring.Outcome) { c.opened[o].Inc() }

// Seed implements [keyring.Observer].
func (c *counters) Seed(_ string, e keyring.Event) { c.seeds[e].Inc() }

// Recovered implements [keyring.Observer]. It is called while a key is lost, when a look-up by label does not matter any more.
func (c *counters) Recovered(provider, by string) {
	c.all.recoveries.WithLabelValues(provider, by).Inc()
}

// CopyUnwrapped implements [keyring.Observer].
func (c *counters) CopyUnwrapped(provider, by, keyID, why string) {
	c.all.app.rescued(provider, by, keyID, why)
}

var (
	outcomes = []keyring.Outcome{
		keyring.OutcomeOK, keyring.OutcomePlaintext, keyring.OutcomeForeign, keyring.OutcomePassthrough, keyring.OutcomeUnavailable,
		keyring.OutcomeSeedRefused, keyring.OutcomeKeyUnusable, keyring.OutcomeCorrupt, keyring.OutcomeStrict, keyring.OutcomeRefused,
	}
	events = []keyring.Event{
		keyring.EventHit, keyring.EventMiss, keyring.EventStale, keyring.EventGenerated, keyring.EventRevoked, keyring.EventGood, keyring.EventBad,
	}
)

// forRule returns the observer of a rule's sealer.
func (m *metrics) forRule(prefix string) keyring.Observer {
	c := &counters{sealed: make(map[keyring.Outcome]prometheus.Counter), opened: make(map[keyring.Outcome]prometheus.Counter)}
	for _, o := range outcomes {
		c.sealed[o] = m.sealed.WithLabelValues(utf8Name(prefix), string(o))
		c.opened[o] = m.opened.WithLabelValues(utf8Name(prefix), string(o))
	}
	return c
}

// utf8Name returns the prefix of a rule or an etcd key for what holds UTF-8 only: labels of metrics,
// the log and the audit log. Other bytes are escaped as in a Go string; JSON would make all of them
// the same replacement character.
func utf8Name(prefix string) string {
	if utf8.ValidString(prefix) {
		return prefix
	}
	return printable(prefix)
}

// forProvider returns the observer of a provider's ring.
func (m *metrics) forProvider(name string) keyring.Observer {
	c := &counters{seeds: make(map[keyring.Event]prometheus.Counter), all: m}
	for _, e := range events {
		c.seeds[e] = m.seeds.WithLabelValues(name, string(e))
	}
	return c
}

// keyStates collects the state of the rings when it is asked for.
type keyStates struct{ app *app }

var (
	healthyDesc  = prometheus.NewDesc("etcd_kms_proxy_kms_healthy", "1 if the last contact with the KMS was good.", []string{"provider"}, nil)
	canSealDesc  = prometheus.NewDesc("etcd_kms_proxy_kms_can_seal", "1 if values can be sealed under the provider now.", []string{"provider"}, nil)
	revokedDesc  = prometheus.NewDesc("etcd_kms_proxy_kms_key_revoked", "1 if the KMS key may not be used.", []string{"provider"}, nil)
	lastGoodDesc = prometheus.NewDesc("etcd_kms_proxy_kms_last_good_contact_seconds", "Unix time of the last good contact with the KMS.", []string{"provider"}, nil)
	lackingDesc  = prometheus.NewDesc("etcd_kms_proxy_recovery_missing", "1 if values are sealed under a seed that has no copy by the recovery provider, or not at all for the want of it.", []string{"provider", "recovery_provider"}, nil)
	mintedDesc   = prometheus.NewDesc("etcd_kms_proxy_seed_minted_seconds", "Unix time when the seed in use was minted.", []string{"provider"}, nil)
	keyDesc      = prometheus.NewDesc("etcd_kms_proxy_kms_key_info", "Always 1; the current KMS key.", []string{"provider", "key_id"}, nil)
)

// Describe implements [prometheus.Collector].
func (keyStates) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{healthyDesc, canSealDesc, revokedDesc, lastGoodDesc, lackingDesc, mintedDesc, keyDesc} {
		ch <- d
	}
}

// Collect implements [prometheus.Collector].
func (k keyStates) Collect(ch chan<- prometheus.Metric) {
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	one := func(b bool) float64 {
		if b {
			return 1
		}
		return 0
	}
	for _, r := range k.app.rings {
		s := r.State()
		gauge(healthyDesc, one(s.Healthy), s.Provider)
		gauge(canSealDesc, one(s.CanSeal), s.Provider)
		gauge(revokedDesc, one(s.Revoked), s.Provider)
		for _, c := range r.Recovery() {
			gauge(lackingDesc, one(c.Lacking != ""), s.Provider, c.Provider)
		}
		if !s.LastGood.IsZero() {
			gauge(lastGoodDesc, float64(s.LastGood.UnixNano())/1e9, s.Provider)
		}
		if !s.Seeded.IsZero() {
			gauge(mintedDesc, float64(s.Seeded.UnixNano())/1e9, s.Provider)
		}
		if s.KeyID != "" {
			gauge(keyDesc, 1, s.Provider, strings.ToValidUTF8(s.KeyID, "\ufffd")) // the KMS' text, whatever it is
		}
	}
}
