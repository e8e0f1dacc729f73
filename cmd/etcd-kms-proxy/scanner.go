package main

import (
	"context"
	"log/slog"
	"time"

	"github.com/prometheus/client_golang/prometheus"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle"
)

// scanner shows the figures of status as metrics, on one of the proxies before an etcd.
type scanner struct {
	fleet    *fleet
	interval time.Duration
	log      *slog.Logger
	values   *prometheus.GaugeVec
	bytes    *prometheus.GaugeVec
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
		at: prometheus.NewGauge(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_scan_seconds", Help: "Unix time of this proxy's last scan of the values in etcd; 0 if another one scans.",
		}),
		failed: prometheus.NewCounter(prometheus.CounterOpts{Name: "etcd_kms_proxy_scan_failures_total", Help: "Scans of the values in etcd that failed."}),
	}
	a.metrics.registry.MustRegister(s.values, s.bytes, s.at, s.failed)
	return s
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
		case !s.fleet.Leading():
			s.values.Reset()
			s.bytes.Reset()
			s.at.Set(0)
			last = time.Time{}
		case time.Since(last) >= s.interval:
			last = time.Now()
			s.scan(ctx)
		}
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
	}
}

func (s *scanner) scan(ctx context.Context) {
	counts, _, err := lifecycle.Survey(ctx, s.fleet.client, s.fleet.rules(), nil)
	if err != nil {
		if ctx.Err() == nil {
			s.failed.Inc()
			s.log.Warn("the values in etcd could not be counted", "error", err)
		}
		return
	}
	s.values.Reset() // rules may have gone
	s.bytes.Reset()
	for _, c := range counts {
		for _, standing := range lifecycle.Standings {
			s.values.WithLabelValues(c.Prefix, string(standing)).Set(float64(c.Standings[standing].Keys))
			s.bytes.WithLabelValues(c.Prefix, string(standing)).Set(float64(c.Standings[standing].Bytes))
		}
	}
	s.at.SetToCurrentTime()
}
