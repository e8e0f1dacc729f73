package server

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
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/periodic"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/restore"
)

// scanner exports the counts of `status` as metrics, on one of the proxies of an etcd.
type scanner struct {
	fleet    *fleet
	interval time.Duration
	log      *slog.Logger

	values, bytes, byKey, keyBytes, oldest, newest *prometheus.GaugeVec

	at     prometheus.Gauge
	failed prometheus.Counter
}

func newScanner(f *fleet, reg prometheus.Registerer, log *slog.Logger, interval time.Duration) *scanner {
	gauge := func(name, help string, labels ...string) *prometheus.GaugeVec {
		return prometheus.NewGaugeVec(prometheus.GaugeOpts{Name: "etcd_kms_proxy_stored_" + name, Help: help}, append([]string{"rule", "state"}, labels...))
	}
	s := &scanner{
		fleet: f, interval: interval, log: log,
		values:   gauge("values", "Values in etcd under a rule, by their state, as status counts them, with serve --scan-interval. Only one proxy exports them."),
		bytes:    gauge("bytes", "Bytes of the values in etcd under a rule, by their state."),
		byKey:    gauge("key_values", "Values in etcd under a rule, by their state and the KMS key that encrypted them. Of many keys, those with the most values; the others are key \"other\".", "provider", "key_id"),
		keyBytes: gauge("key_bytes", "Bytes of the values in etcd under a rule, by their state and the KMS key that encrypted them.", "provider", "key_id"),
		oldest:   gauge("oldest_revision", "The lowest revision that wrote one of the values in etcd under a rule, by their state."),
		newest:   gauge("newest_revision", "The highest revision that wrote one of the values in etcd under a rule, by their state."),
		at: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_scan_timestamp_seconds", Help: "Unix time of this proxy's last scan of the values in etcd; 0 if another proxy scans.",
		}),
		failed: prometheus.NewCounter(prometheus.CounterOpts{Name: "etcd_kms_proxy_scan_failures_total", Help: "Scans of the values in etcd that failed."}),
	}
	for _, g := range s.gauges() {
		reg.MustRegister(g)
	}
	reg.MustRegister(s.at, s.failed)
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

// leaderCheckInterval is how often a proxy checks whether it is the one that scans.
const leaderCheckInterval = 10 * time.Second

// run scans at every interval while this proxy is the leader, until ctx ends.
func (s *scanner) run(ctx context.Context) {
	var last time.Time
	periodic.Run(ctx, min(leaderCheckInterval, s.interval), func() {
		switch {
		case !s.fleet.Leads(jobScan):
			s.reset()
			s.at.Set(0)
			last = time.Time{}
		case time.Since(last) >= s.interval:
			last = time.Now()
			if errors.Is(s.scan(ctx), restore.ErrRestored) {
				last = time.Time{} // scan the restored data at the next tick
			}
		}
	})
}

// scan counts the values. It logs and returns an error.
func (s *scanner) scan(ctx context.Context) error {
	counts, _, err := inventory.Survey(ctx, s.fleet.client, s.fleet.stored(), nil)
	if err != nil {
		if ctx.Err() == nil {
			s.failed.Inc()
			s.log.Warn("the values in etcd could not be counted", "error", err)
		}
		return err
	}
	s.reset() // rules may have been removed
	for _, c := range counts {
		rule := printable.UTF8(c.Prefix)
		for _, state := range inventory.States {
			n := c.States[state]
			s.values.WithLabelValues(rule, string(state)).Set(float64(n.Keys))
			s.bytes.WithLabelValues(rule, string(state)).Set(float64(n.Bytes))
			if n.Keys > 0 {
				s.oldest.WithLabelValues(rule, string(state)).Set(float64(n.Oldest))
				s.newest.WithLabelValues(rule, string(state)).Set(float64(n.Newest))
			}
		}
		for _, k := range labelledKeys(c.Keys) {
			labels := []string{rule, string(k.State), k.Provider, k.KeyID}
			s.byKey.WithLabelValues(labels...).Set(float64(k.Keys))
			s.keyBytes.WithLabelValues(labels...).Set(float64(k.Bytes))
		}
	}
	s.at.SetToCurrentTime()
	return nil
}

// labelKeys limits the keys of a rule that have metrics of their own: the writer of a value chooses
// the key that it names.
const labelKeys = 20

// labelledKeys returns the keys with the most values, as labels of metrics, and the others of each
// state as one.
func labelledKeys(keys []inventory.KeyCount) (out []inventory.KeyCount) {
	keys = slices.Clone(keys)
	slices.SortStableFunc(keys, func(a, b inventory.KeyCount) int { return cmp.Compare(b.Keys, a.Keys) })
	rest := make(map[keyring.ValueState]*inventory.KeyCount)
	for i, k := range keys {
		k.Provider, k.KeyID = strings.ToValidUTF8(k.Provider, "?"), strings.ToValidUTF8(k.KeyID, "?")
		if i < labelKeys && k.Provider != "" {
			out = append(out, k)
			continue
		}
		r := rest[k.State]
		if r == nil {
			r = &inventory.KeyCount{State: k.State, Provider: "other", KeyID: "other"}
			rest[k.State] = r
		}
		r.Keys, r.Bytes = r.Keys+k.Keys, r.Bytes+k.Bytes
	}
	for _, state := range inventory.States {
		if r := rest[state]; r != nil {
			out = append(out, *r)
		}
	}
	return out
}
