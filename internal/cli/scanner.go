package cli

import (
	"cmp"
	"context"
	"errors"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/restore"
)

// scanner shows the figures of status as metrics, on one of the proxies before an etcd.
type scanner struct {
	fleet    *fleet
	interval time.Duration
	log      *slog.Logger
	values   *prometheus.GaugeVec
	bytes    *prometheus.GaugeVec
	byKey    *prometheus.GaugeVec
	keyBytes *prometheus.GaugeVec
	oldest   *prometheus.GaugeVec
	newest   *prometheus.GaugeVec
	at       prometheus.Gauge
	failed   prometheus.Counter
}

func newScanner(a *app, interval time.Duration) *scanner {
	s := &scanner{
		fleet: a.fleet, interval: interval, log: a.log,
		values: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_stored_values", Help: "Values in etcd under a rule, by their standing, as the last scan counted them. Only one proxy shows them.",
		}, []string{"rule", "standing"}),
		bytes: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_stored_bytes", Help: "Bytes of the values in etcd under a rule, by their standing.",
		}, []string{"rule", "standing"}),
		byKey: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_stored_key_values", Help: "Values in etcd under a rule, by their standing and the KMS key that sealed them. Of many keys, those of the most values; the rest is key \"other\".",
		}, []string{"rule", "standing", "provider", "key_id"}),
		keyBytes: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_stored_key_bytes", Help: "Bytes of the values in etcd under a rule, by their standing and the KMS key that sealed them.",
		}, []string{"rule", "standing", "provider", "key_id"}),
		oldest: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_stored_oldest_revision", Help: "The least of the revisions that wrote the values in etcd under a rule, by their standing.",
		}, []string{"rule", "standing"}),
		newest: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_stored_newest_revision", Help: "The greatest of the revisions that wrote the values in etcd under a rule, by their standing.",
		}, []string{"rule", "standing"}),
		at: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_scan_seconds", Help: "Unix time of this proxy's last scan of the values in etcd; 0 if another one scans.",
		}),
		failed: prometheus.NewCounter(prometheus.CounterOpts{Name: "etcd_kms_proxy_scan_failures_total", Help: "Scans of the values in etcd that failed."}),
	}
	for _, g := range s.gauges() {
		a.metrics.registry.MustRegister(g)
	}
	a.metrics.registry.MustRegister(s.at, s.failed)
	return s
}

// gauges are those of a scan.
func (s *scanner) gauges() []*prometheus.GaugeVec {
	return []*prometheus.GaugeVec{s.values, s.bytes, s.byKey, s.keyBytes, s.oldest, s.newest}
}

func (s *scanner) reset() {
	for _, g := range s.gauges() {
		g.Reset()
	}
}

// leadCheck is how often a proxy looks whether it has become the one that scans.
const leadCheck = 10 * time.Second

// run scans at every interval while this proxy is the one that does, until ctx ends.
func (s *scanner) run(ctx context.Context) {
	var last time.Time
	tick := time.NewTicker(min(leadCheck, s.interval))
	defer tick.Stop()
	for {
		switch {
		case !s.fleet.Leader():
			s.reset()
			s.at.Set(0)
			last = time.Time{}
		case time.Since(last) >= s.interval:
			last = time.Now()
			if errors.Is(s.scan(ctx), restore.ErrRestored) {
				last = time.Time{} // at the next tick, on the data that there is now
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

// scan counts the values, and returns what it has logged.
func (s *scanner) scan(ctx context.Context) error {
	counts, _, err := inventory.Survey(ctx, s.fleet.client, s.fleet.rules(), nil)
	if err != nil {
		if ctx.Err() == nil {
			s.failed.Inc()
			s.log.Warn("the values in etcd could not be counted", "error", err)
		}
		return err
	}
	s.reset() // rules may have gone
	for _, c := range counts {
		rule := utf8Name(c.Prefix)
		for _, standing := range inventory.Standings {
			n := c.Standings[standing]
			s.values.WithLabelValues(rule, string(standing)).Set(float64(n.Keys))
			s.bytes.WithLabelValues(rule, string(standing)).Set(float64(n.Bytes))
			if n.Keys > 0 {
				s.oldest.WithLabelValues(rule, string(standing)).Set(float64(n.Oldest))
				s.newest.WithLabelValues(rule, string(standing)).Set(float64(n.Newest))
			}
		}
		for _, k := range labelled(c.Keys) {
			labels := []string{rule, string(k.Standing), k.Provider, k.KeyID}
			s.byKey.WithLabelValues(labels...).Set(float64(k.Keys))
			s.keyBytes.WithLabelValues(labels...).Set(float64(k.Bytes))
		}
	}
	s.at.SetToCurrentTime()
	return nil
}

// labelKeys is how many keys of a rule have figures of their own: what values name is their writers' choice.
const labelKeys = 20

// labelled gives the keys of the most values, in a form that metrics take, and the rest of each standing as one.
func labelled(keys []inventory.KeyCount) (out []inventory.KeyCount) {
	keys = slices.Clone(keys)
	slices.SortStableFunc(keys, func(a, b inventory.KeyCount) int { return cmp.Compare(b.Keys, a.Keys) })
	rest := make(map[keyring.ValueState]*inventory.KeyCount)
	for i, k := range keys {
		k.Provider, k.KeyID = strings.ToValidUTF8(k.Provider, "?"), strings.ToValidUTF8(k.KeyID, "?")
		if i < labelKeys && k.Provider != "" {
			out = append(out, k)
			continue
		}
		r := rest[k.Standing]
		if r == nil {
			r = &inventory.KeyCount{Standing: k.Standing, Provider: "other", KeyID: "other"}
			rest[k.Standing] = r
		}
		r.Keys, r.Bytes = r.Keys+k.Keys, r.Bytes+k.Bytes
	}
	for _, standing := range inventory.Standings {
		if r := rest[standing]; r != nil {
			out = append(out, *r)
		}
	}
	return out
}
