package stored

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
)

const lastDrillMetric = "etcd_kms_proxy_drill_last_success_timestamp_seconds"

// drillMetrics are the metrics in the file of --metrics-file. None has a KMS key ID or an etcd key
// as a label.
type drillMetrics struct {
	lastRun, lastSuccess, success prometheus.Gauge
	values, seconds               *prometheus.GaugeVec
}

// newDrillMetrics registers the metrics, without that of the last success, which may not exist.
func newDrillMetrics(r prometheus.Registerer) *drillMetrics {
	gauge := func(name, help string) prometheus.Gauge {
		return prometheus.NewGauge(prometheus.GaugeOpts{Name: name, Help: help})
	}
	m := &drillMetrics{
		lastRun:     gauge("etcd_kms_proxy_drill_last_run_timestamp_seconds", "When the last drill ended, in Unix seconds."),
		lastSuccess: gauge(lastDrillMetric, "When the last drill ended that passed, in Unix seconds."),
		success:     gauge("etcd_kms_proxy_drill_success", "1 if the last drill passed: each value that it tried is readable without the keys that it treated as lost."),
		values: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_drill_values",
			Help: "Values under each rule in the last drill by result: readable, missing (they do not decrypt), unavailable (the KMS that is left did not respond), or untried (not in the sample).",
		}, []string{"rule", "result"}),
		seconds: prometheus.NewGaugeVec(prometheus.GaugeOpts{
			Name: "etcd_kms_proxy_drill_step_seconds",
			Help: "How long each step of the last drill took: snapshot, restore, start (of etcd) or decrypt.",
		}, []string{"step"}),
	}
	r.MustRegister(m.lastRun, m.success, m.values, m.seconds)
	return m
}

// RegisterDrillMetrics registers every metric of the command drill, for the reference of metrics.
func RegisterDrillMetrics(r prometheus.Registerer) {
	r.MustRegister(newDrillMetrics(r).lastSuccess)
}

// writeDrillMetrics replaces the file with the metrics of a drill that ended now. The time of the
// last success is taken from the old file if this drill failed. report may be nil.
func writeDrillMetrics(file string, report *drillReport, passed bool, now time.Time) error {
	registry := prometheus.NewRegistry()
	m := newDrillMetrics(registry)
	m.lastRun.Set(float64(now.Unix()))
	last, err := lastDrill(file)
	if err != nil {
		return err
	}
	if passed {
		last = float64(now.Unix())
		m.success.Set(1)
	}
	if last > 0 {
		m.lastSuccess.Set(last)
		registry.MustRegister(m.lastSuccess)
	}
	if report != nil {
		for _, r := range report.Rules {
			for result, n := range map[string]int64{"readable": r.Readable, "missing": r.Missing, "unavailable": r.Unavailable, "untried": r.Untried} {
				m.values.WithLabelValues(strings.ToValidUTF8(r.Prefix, "\uFFFD"), result).Set(float64(n))
			}
		}
		for step, s := range map[string]float64{
			"snapshot": report.Seconds.Snapshot, "restore": report.Seconds.Restore, "start": report.Seconds.Start, "decrypt": report.Seconds.Decrypt,
		} {
			m.seconds.WithLabelValues(step).Set(s)
		}
	}
	return prometheus.WriteToTextfile(file, registry) // a reader finds the old file or the new one
}

// checkMetricsFile returns an error if the file could not be replaced after the drill.
func checkMetricsFile(file string) error {
	if _, err := lastDrill(file); err != nil {
		return err
	}
	f, err := os.CreateTemp(filepath.Dir(file), "."+filepath.Base(file))
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), os.Remove(f.Name()))
}

// lastDrill returns the time of the last success in the file, or 0.
func lastDrill(file string) (float64, error) {
	old, err := os.ReadFile(file) //nolint:gosec // the operator names the file
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(old)) {
		if value, ok := strings.CutPrefix(strings.TrimSpace(line), lastDrillMetric+" "); ok {
			if at, err := strconv.ParseFloat(value, 64); err == nil {
				return at, nil
			}
		}
	}
	return 0, nil
}
