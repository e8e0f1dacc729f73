package cli

import (
	"context"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy"
)

// nextStart checks, while the proxy serves, what its next start depends on: that the guard may read its record, which
// ends when somebody turns etcd's authentication on, and that etcd.endpoints leads to etcd and not to another proxy.
type nextStart struct {
	log      *slog.Logger
	refused  atomic.Bool // etcd does not let the record be read
	readable prometheus.Gauge
}

// nextStartCheck is the time between two checks.
const nextStartCheck = 15 * time.Second

func newNextStart(a *app) *nextStart {
	n := &nextStart{log: a.log, readable: prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "etcd_kms_proxy_guard_record_readable",
		Help: "0 if etcd's authentication keeps the proxy from reading the record of the rules, so that it would serve nothing after a restart; otherwise 1.",
	})}
	n.readable.Set(1)
	a.metrics.registry.MustRegister(n.readable)
	return n
}

// run checks until ctx ends. It returns an error if the proxy must not serve any longer.
func (n *nextStart) run(ctx context.Context, g *guard) error {
	tick := time.NewTicker(nextStartCheck)
	defer tick.Stop()
	for {
		if err := leadsToProxy(ctx, g.config, n.log); err != nil && ctx.Err() == nil {
			return err
		}
		limited, cancel := context.WithTimeout(ctx, guardTimeout)
		_, err := g.records(limited, clientv3.WithSerializable())
		cancel()
		n.note(err)
		select {
		case <-ctx.Done():
			return nil
		case <-tick.C:
		}
	}
}

// note takes in how a read of the record went. An etcd that does not answer says nothing about it.
func (n *nextStart) note(err error) {
	switch {
	case denied(err):
		n.readable.Set(0)
		if !n.refused.Swap(true) {
			n.log.Warn("etcd's authentication keeps the proxy from reading the record of the rules: after its next restart it will serve nothing",
				"error", err, "hint", deniedHint)
		}
	case err == nil:
		n.readable.Set(1)
		if n.refused.Swap(false) {
			n.log.Info("the record of the rules can be read again")
		}
	}
}

// ready is the check's part of the readiness report.
func (n *nextStart) ready() proxy.Check {
	check := proxy.Check{Name: "guard", OK: !n.refused.Load()}
	if !check.OK {
		check.Detail = "etcd's authentication keeps the proxy from reading the record of the rules: after its next restart it will serve nothing; " + deniedHint
	}
	return check
}
