package server

import (
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/time/rate"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/logonce"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/readiness"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// bypasses counts values that were written in plaintext to etcd directly, and reports each key
// once.
type bypasses struct {
	audit    *auditlog.Log
	log      *slog.Logger
	count    *prometheus.CounterVec
	reported *logonce.Keys
	logged   rate.Sometimes
	last     atomic.Int64 // when the last one was found, in Unix seconds
}

const (
	bypassKeys        = 10_000 // that are remembered
	bypassNotice      = time.Hour
	bypassLogInterval = time.Minute
)

func newBypasses(audit *auditlog.Log, reg prometheus.Registerer, log *slog.Logger) *bypasses {
	b := &bypasses{
		audit: audit, log: log, reported: logonce.NewKeys(bypassKeys), logged: rate.Sometimes{Interval: bypassLogInterval},
		count: prometheus.NewCounterVec(prometheus.CounterOpts{
			Name: "etcd_kms_proxy_plaintext_writes_seen_total", Help: "Values that were written in plaintext to etcd directly, under a rule that encrypts.",
		}, []string{"rule"}),
	}
	reg.MustRegister(b.count)
	return b
}

// expect creates the counters of rules at 0: Prometheus sees no increase of a counter that did not
// exist.
func (b *bypasses) expect(rules []config.Rule) {
	for _, r := range rules {
		if r.WriteWith != config.Plaintext {
			b.count.WithLabelValues(printable.UTF8(r.Prefix))
		}
	}
}

// found is called for each such value.
func (b *bypasses) found(rule *inventory.Rule, key string, revision int64) {
	prefix, name := printable.UTF8(rule.Prefix), printable.UTF8(key)
	b.last.Store(time.Now().Unix())
	b.count.WithLabelValues(prefix).Inc()
	if !b.reported.First(key) {
		return
	}
	b.audit.Record(auditlog.Record{Event: auditlog.EventBypass, Rule: prefix, Key: name, KeyBytes: inventory.KeyBytes(key), Revision: revision})
	// The audit log has all of them; many writes do not fill the log of the process.
	b.logged.Do(func() {
		b.log.Error("a value was written in plaintext to etcd directly, under a rule that encrypts", "rule", prefix, "key", name,
			"revision", revision, "hint", bypassHint(rule))
	})
}

// bypassHint says what to do about a value that was written to etcd directly. Nothing encrypts a
// value that clients may not read, except on request.
func bypassHint(rule *inventory.Rule) string {
	if rule.Strict {
		return "find out who wrote it; reads of it are refused and reencrypt skips it, since the rule has allowPlaintextReads: false; delete it, or write it again through a proxy"
	}
	return "find out who wrote it; reads return it unchanged, and reencrypt encrypts it unchanged: delete it first if it is not genuine"
}

func (b *bypasses) ready(now time.Time) readiness.Check {
	check := readiness.Check{Name: "bypass", OK: true}
	if last := time.Unix(b.last.Load(), 0); now.Sub(last) < bypassNotice {
		check.OK, check.Detail = false, "a value was written in plaintext to etcd directly, last at "+last.UTC().Format(time.RFC3339)
	}
	return check
}
