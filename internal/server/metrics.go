package server

import (
	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/buildinfo"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/readiness"
)

// newRegistry returns a registry with the metrics of the process.
func newRegistry() *prometheus.Registry {
	build := buildinfo.Read()
	info := prometheus.NewGauge(prometheus.GaugeOpts{
		Name: "etcd_kms_proxy_build_info", Help: "Always 1; what the binary was built from.",
		ConstLabels: prometheus.Labels{"version": build.Version, "commit": build.Commit, "go": build.Go},
	})
	info.Set(1)
	r := prometheus.NewRegistry()
	r.MustRegister(info, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return r
}

// registerAudit adds the metrics of the audit log, if there is one.
func registerAudit(reg prometheus.Registerer, audit *auditlog.Log) {
	if audit == nil {
		return
	}
	reg.MustRegister(
		prometheus.NewCounterFunc(prometheus.CounterOpts{
			Name: "etcd_kms_proxy_audit_lost_total", Help: "Records of the audit log that could not be written.",
		}, func() float64 { return float64(audit.Lost()) }),
		prometheus.NewGaugeFunc(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_audit_writable", Help: "1 if the audit log can be written. Only with an audit block.",
		}, func() float64 {
			if audit.Check() != nil {
				return 0
			}
			return 1
		}))
}

// auditChecks returns the line of the readiness report about the audit log, if there is one.
func auditChecks(audit *auditlog.Log) []readiness.Check {
	if audit == nil {
		return nil
	}
	c := readiness.Check{Name: "audit", OK: true}
	if err := audit.Check(); err != nil {
		c.OK, c.Detail = false, err.Error()
	}
	return []readiness.Check{c}
}
