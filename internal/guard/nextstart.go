package guard

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/etcdclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/readiness"
)

// NextStart checks, while the proxy serves, whether it could start again: that the guard may read
// the record of the rules, which ends when etcd's authentication is turned on, and that
// etcd.endpoints still leads to etcd and not to a proxy.
type NextStart struct {
	log      *slog.Logger
	refused  atomic.Bool // etcd's authentication refuses the record
	readable prometheus.Gauge
}

// nextStartInterval is the time between two checks.
const nextStartInterval = 15 * time.Second

// NewNextStart registers its metric with reg.
func NewNextStart(reg prometheus.Registerer, log *slog.Logger) *NextStart {
	n := &NextStart{log: log, readable: prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "etcd_kms_proxy_guard_record_readable",
		Help: "0 if etcd's authentication keeps the proxy from reading the record of the rules, so that it would serve nothing after a restart; otherwise 1.",
	})}
	n.readable.Set(1)
	reg.MustRegister(n.readable)
	return n
}

// Run checks until ctx ends. It returns an error if the proxy must stop serving.
func (n *NextStart) Run(ctx context.Context, g *Guard) error {
	tick := time.NewTicker(nextStartInterval)
	defer tick.Stop()
	for {
		if err := etcdclient.CheckNotProxy(ctx, g.Config, n.log); err != nil && ctx.Err() == nil {
			return err
		}
		limited, cancel := context.WithTimeout(ctx, requestTimeout)
		_, err := g.records(limited, clientv3.WithSerializable())
		cancel()
		n.update(err)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

const unreadable = "etcd's authentication keeps the proxy from reading the record of the rules: after its next restart it will serve nothing"

// update evaluates an attempt to read the record. An etcd that does not respond changes nothing.
func (n *NextStart) update(err error) {
	switch {
	case denied(err):
		n.readable.Set(0)
		if !n.refused.Swap(true) {
			n.log.Warn(unreadable, "error", err, "hint", deniedHint)
		}
	case err == nil:
		n.readable.Set(1)
		if n.refused.Swap(false) {
			n.log.Info("the record of the rules can be read again")
		}
	}
}

// Check returns the line of the readiness report.
func (n *NextStart) Check() readiness.Check {
	check := readiness.Check{Name: "guard", OK: !n.refused.Load()}
	if !check.OK {
		check.Detail = unreadable + "; " + deniedHint
	}
	return check
}
