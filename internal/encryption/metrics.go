package encryption

import (
	"slices"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/rule"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/provider"
)

// metrics are those of rules and keys. No label contains an etcd key: rules are named by their
// prefix.
type metrics struct {
	encrypted, decrypted *prometheus.CounterVec
	seeds, recoveries    *prometheus.CounterVec
	calls                *provider.CallMetrics
	keys                 *Keys
}

func newMetrics(reg prometheus.Registerer, k *Keys, cache *keyring.Cache) *metrics {
	counter := func(name, help string, labels ...string) *prometheus.CounterVec {
		return prometheus.NewCounterVec(prometheus.CounterOpts{Name: "etcd_kms_proxy_" + name, Help: help}, labels)
	}
	m := &metrics{
		keys: k, calls: provider.NewCallMetrics(reg),
		encrypted:  counter("values_encrypted_total", "Values written. outcome: ok, plaintext, unavailable, key_unusable, refused.", "rule", "outcome"),
		decrypted:  counter("values_decrypted_total", "Values read. outcome: ok, plaintext, foreign, passthrough, unavailable, seed_refused, key_unusable, corrupt, strict.", "rule", "outcome"),
		seeds:      counter("seed_events_total", "Events of the DEK seeds of a provider. event: hit, miss, stale (used after its TTL), generated, revoked, good and bad (the result of the health check changed).", "provider", "event"),
		recoveries: counter("recovery_uses_total", "Values decrypted by a recovery copy of their DEK seed, by their provider and that of the copy.", "provider", "recovery_provider"),
	}
	cached := prometheus.NewGaugeFunc(prometheus.GaugeOpts{
		Name: "etcd_kms_proxy_seed_cache_entries", Help: "Unwrapped DEK seeds in the cache.",
	}, func() float64 { return float64(cache.Len()) })
	reg.MustRegister(m.encrypted, m.decrypted, m.seeds, m.recoveries, cached, keyStates{k}, provider.States(m.providerStates),
		provider.Watches(func() []*provider.Watch { return k.watches }))
	return m
}

// expectRecoveries creates the counters of recovery copies at 0: Prometheus sees no increase of a
// counter that did not exist. Any provider of a rule may decrypt for any other.
func (m *metrics) expectRecoveries(k *Keys, rules []config.Rule) {
	for _, r := range rules {
		names := slices.Concat([]string{r.WriteWith}, r.ReadWith, r.Recovery)
		for _, provider := range names {
			for _, by := range names {
				if provider != by && k.ring(provider) != nil && k.ring(by) != nil {
					m.recoveries.WithLabelValues(provider, by)
				}
			}
		}
	}
}

// ruleCounters are those of one rule. They are looked up in advance, because a look-up by label on
// the data path would cost more than the encryption.
type ruleCounters struct {
	encryptedOK, decryptedOK prometheus.Counter // the most frequent ones, without a look-up
	encrypted, decrypted     map[rule.Outcome]prometheus.Counter
}

// Sealed implements [rule.Observer].
func (c *ruleCounters) Sealed(_ string, o rule.Outcome) {
	if o == rule.OutcomeOK {
		c.encryptedOK.Inc()
		return
	}
	c.encrypted[o].Inc()
}

// Opened implements [rule.Observer].
func (c *ruleCounters) Opened(_ string, o rule.Outcome) {
	if o == rule.OutcomeOK {
		c.decryptedOK.Inc()
		return
	}
	c.decrypted[o].Inc()
}

// seedCounters are those of one provider.
type seedCounters struct {
	hits   prometheus.Counter // the most frequent event, without a look-up
	events map[keyring.Event]prometheus.Counter
	all    *metrics
}

// Seed implements [keyring.Observer].
func (c *seedCounters) Seed(_ string, e keyring.Event) {
	if e == keyring.EventHit {
		c.hits.Inc()
		return
	}
	c.events[e].Inc()
}

// Recovered implements [keyring.Observer]. It is called only while a key is lost.
func (c *seedCounters) Recovered(provider, by string) {
	c.all.recoveries.WithLabelValues(provider, by).Inc()
}

// CopyUnwrapped implements [keyring.Observer]. A metric counts the values that the seed decrypts.
func (c *seedCounters) CopyUnwrapped(provider, by, keyID, why string) {
	c.all.keys.record(auditlog.Record{Event: auditlog.EventRecovery, Primary: provider, Provider: by, KeyID: keyID, Reason: why})
}

var (
	outcomes = []rule.Outcome{
		rule.OutcomeOK, rule.OutcomePlaintext, rule.OutcomeForeign, rule.OutcomePassthrough, rule.OutcomeUnavailable,
		rule.OutcomeSeedRefused, rule.OutcomeKeyUnusable, rule.OutcomeCorrupt, rule.OutcomeStrict, rule.OutcomeRefused,
	}
	events = []keyring.Event{
		keyring.EventHit, keyring.EventMiss, keyring.EventStale, keyring.EventGenerated, keyring.EventRevoked, keyring.EventGood, keyring.EventBad,
	}
)

// forRule returns the observer of a rule's sealer.
func (m *metrics) forRule(prefix string) *ruleCounters {
	c := &ruleCounters{encrypted: make(map[rule.Outcome]prometheus.Counter), decrypted: make(map[rule.Outcome]prometheus.Counter)}
	for _, o := range outcomes {
		c.encrypted[o] = m.encrypted.WithLabelValues(printable.UTF8(prefix), string(o))
		c.decrypted[o] = m.decrypted.WithLabelValues(printable.UTF8(prefix), string(o))
	}
	c.encryptedOK, c.decryptedOK = c.encrypted[rule.OutcomeOK], c.decrypted[rule.OutcomeOK]
	return c
}

// forProvider returns the observer of a provider's ring.
func (m *metrics) forProvider(name string) *seedCounters {
	c := &seedCounters{events: make(map[keyring.Event]prometheus.Counter), all: m}
	for _, e := range events {
		c.events[e] = m.seeds.WithLabelValues(name, string(e))
	}
	c.hits = c.events[keyring.EventHit]
	return c
}

func (m *metrics) providerStates() []provider.State {
	var states []provider.State
	for _, r := range m.keys.rings {
		s := r.State()
		states = append(states, provider.State{Provider: s.Provider, Healthy: s.Healthy, LastSuccess: s.LastGood, KeyID: s.KeyID})
	}
	return states
}

// keyStates exports the state of the rings.
type keyStates struct{ keys *Keys }

var (
	canEncryptDesc = prometheus.NewDesc("etcd_kms_proxy_kms_can_encrypt", "1 if values can be encrypted with the provider now. Always 0 for a provider that no rule writes with.", []string{"provider"}, nil)
	revokedDesc    = prometheus.NewDesc("etcd_kms_proxy_kms_key_revoked", "1 if the KMS says that the key may not be used.", []string{"provider"}, nil)
	missingDesc    = prometheus.NewDesc("etcd_kms_proxy_recovery_missing", "1 if values are encrypted under a DEK seed without a copy by the recovery provider, or are refused because it is missing.", []string{"provider", "recovery_provider"}, nil)
	generatedDesc  = prometheus.NewDesc("etcd_kms_proxy_seed_generated_timestamp_seconds", "Unix time when the DEK seed in use was generated.", []string{"provider"}, nil)
)

// Describe implements [prometheus.Collector].
func (keyStates) Describe(ch chan<- *prometheus.Desc) {
	for _, d := range []*prometheus.Desc{canEncryptDesc, revokedDesc, missingDesc, generatedDesc} {
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
	for _, r := range k.keys.rings {
		s := r.State()
		gauge(canEncryptDesc, one(s.CanSeal), s.Provider)
		gauge(revokedDesc, one(s.Revoked), s.Provider)
		for _, c := range r.Recovery() {
			gauge(missingDesc, one(c.Lacking != ""), s.Provider, c.Provider)
		}
		if !s.Seeded.IsZero() {
			gauge(generatedDesc, float64(s.Seeded.UnixNano())/1e9, s.Provider)
		}
	}
}
