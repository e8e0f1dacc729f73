package main

import (
	"fmt"
	"io"
	"math"
	"runtime"
	"slices"
	"text/tabwriter"
	"time"
)

// Report is the result of a run.
type Report struct {
	CPUs        int      `json:"cpus"`
	Go          string   `json:"go"`
	CPUSource   string   `json:"cpuSource"`
	Rounds      int      `json:"rounds"`
	Seconds     float64  `json:"seconds"` // of each measurement
	Connections int      `json:"connections"`
	Busy        int      `json:"busy"` // processes that only use CPU
	Subjects    []string `json:"subjects"`
	Rows        []*Row   `json:"rows"`
}

// Row is one thing that was measured, on every subject.
type Row struct {
	Name    string             `json:"name"`
	Unit    string             `json:"unit"` // request, list or event
	Clients int                `json:"clients"`
	Results map[string]*Result `json:"results"` // by subject
}

// Result is a row on one subject: medians of the rounds. CPU times are µs for each unit.
type Result struct {
	PerSecond   float64  `json:"perSecond"` // units
	P50US       float64  `json:"p50Microseconds"`
	P99US       float64  `json:"p99Microseconds"`
	ProxyUS     float64  `json:"proxyCPUMicroseconds,omitempty"`
	EtcdUS      float64  `json:"etcdCPUMicroseconds"`
	ClientUS    float64  `json:"clientCPUMicroseconds"`
	TotalUS     float64  `json:"totalCPUMicroseconds"`           // of all three
	Allocations *float64 `json:"allocations,omitempty"`          // of etcd-kms-proxy, for each unit
	PeakMiB     float64  `json:"peakMemoryMiB,omitempty"`        // most of any round, resident
	AddedP50US  *float64 `json:"addedP50Microseconds,omitempty"` // to direct
	AddedP99US  *float64 `json:"addedP99Microseconds,omitempty"`

	// Ratios to other subjects; nil if the other subject was not measured.
	ProxyToGRPCProxy  *Ratio `json:"proxyCPUToGRPCProxy,omitempty"`
	ProxyToLayer4     *Ratio `json:"proxyCPUToLayer4,omitempty"`
	ProxyToHAProxy    *Ratio `json:"proxyCPUToHAProxy,omitempty"`
	ProxyToBase       *Ratio `json:"proxyCPUToBase,omitempty"` // the same rule in the other build
	TotalToDirect     *Ratio `json:"totalCPUToDirect,omitempty"`
	PerSecondToDirect *Ratio `json:"perSecondToDirect,omitempty"`

	rounds []figures
}

// Ratio is the median of the ratios of all rounds, and the least and the greatest of them.
type Ratio struct {
	Median float64 `json:"median"`
	Low    float64 `json:"low"`
	High   float64 `json:"high"`
}

// figures are those of one round, per unit.
type figures struct {
	perSecond, p50, p99, proxy, etcd, client, total, allocations, peak float64
}

func newReport(cfg config) *Report {
	return &Report{CPUs: runtime.NumCPU(), Go: runtime.Version(), CPUSource: cpuSource(), Rounds: cfg.Rounds,
		Seconds: cfg.Duration.Seconds(), Connections: cfg.Conns, Busy: cfg.Busy, Subjects: cfg.Subjects}
}

func (r *Report) row(name string) *Row {
	for _, row := range r.Rows {
		if row.Name == name {
			return row
		}
	}
	return nil
}

// add takes the sample of the next round.
func (r *Row) add(subject string, m sample) {
	us := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }
	n := float64(m.units)
	if r.Results[subject] == nil {
		r.Results[subject] = &Result{}
	}
	res := r.Results[subject]
	res.rounds = append(res.rounds, figures{
		perSecond: n / m.elapsed.Seconds(), p50: us(m.p50), p99: us(m.p99),
		proxy: us(m.proxy) / n, etcd: us(m.etcd) / n, client: us(m.client) / n, total: us(m.proxy+m.etcd+m.client) / n,
		allocations: m.allocated / n, peak: float64(m.peak) / (1 << 20),
	})
}

// finish computes the medians and the ratios.
func (r *Report) finish() {
	for _, row := range r.Rows {
		for name, res := range row.Results {
			all := func(f func(figures) float64) float64 { return median(mapped(res.rounds, f)) }
			res.PerSecond, res.P50US, res.P99US = all(func(f figures) float64 { return f.perSecond }), all(p50), all(p99)
			res.ProxyUS, res.EtcdUS = all(proxyCPU), all(func(f figures) float64 { return f.etcd })
			res.ClientUS, res.TotalUS = all(func(f figures) float64 { return f.client }), all(totalCPU)
			res.PeakMiB = slices.Max(mapped(res.rounds, func(f figures) float64 { return f.peak }))
			if n := all(func(f figures) float64 { return f.allocations }); !math.IsNaN(n) {
				res.Allocations = &n
			}
			base := row.Results[direct]
			res.TotalToDirect, res.PerSecondToDirect = ratio(res, base, totalCPU), ratio(res, base, func(f figures) float64 { return f.perSecond })
			if name == direct {
				continue
			}
			res.AddedP50US, res.AddedP99US = added(res, base, p50), added(res, base, p99)
			res.ProxyToGRPCProxy = ratio(res, row.Results[grpcProxy], proxyCPU)
			res.ProxyToLayer4 = ratio(res, row.Results[layer4], proxyCPU)
			res.ProxyToHAProxy = ratio(res, row.Results[haproxy], proxyCPU)
			switch name {
			case passing:
				res.ProxyToBase = ratio(res, row.Results[basePassing], proxyCPU)
			case encrypting:
				res.ProxyToBase = ratio(res, row.Results[baseEncrypting], proxyCPU)
			}
		}
	}
}

func p50(f figures) float64      { return f.p50 }
func p99(f figures) float64      { return f.p99 }
func proxyCPU(f figures) float64 { return f.proxy }
func totalCPU(f figures) float64 { return f.total }

// ratio compares a with b round by round; nil if b was not measured.
func ratio(a, b *Result, f func(figures) float64) *Ratio {
	if b == nil {
		return nil
	}
	var all []float64
	for i := range a.rounds {
		all = append(all, f(a.rounds[i])/f(b.rounds[i]))
	}
	return &Ratio{Median: median(all), Low: slices.Min(all), High: slices.Max(all)}
}

// added is the median of what a takes longer than b; nil if b was not measured.
func added(a, b *Result, f func(figures) float64) *float64 {
	if b == nil {
		return nil
	}
	var all []float64
	for i := range a.rounds {
		all = append(all, f(a.rounds[i])-f(b.rounds[i]))
	}
	m := median(all)
	return &m
}

func mapped(fs []figures, f func(figures) float64) []float64 {
	all := make([]float64, len(fs))
	for i := range fs {
		all[i] = f(fs[i])
	}
	return all
}

func median(all []float64) float64 {
	all = slices.Clone(all)
	slices.Sort(all)
	if n := len(all); n%2 == 0 {
		return (all[n/2-1] + all[n/2]) / 2
	}
	return all[len(all)/2]
}

// print writes the report as tables.
func (r *Report) print(out io.Writer) error {
	fmt.Fprintf(out, "%d CPUs, %s; medians of %d rounds of %gs, subjects in turns; at most %d connections for a row; %d busy processes\nCPU time: %s\n",
		r.CPUs, r.Go, r.Rounds, r.Seconds, r.Connections, r.Busy, r.CPUSource)
	fmt.Fprintf(out, "%s: a TCP relay in Go; %s: etcd's own; %s and %s: etcd-kms-proxy without and with a rule for the keys\n",
		layer4, grpcProxy, passing, encrypting)
	proxies := slices.DeleteFunc(slices.Clone(r.Subjects), func(s string) bool { return s == direct })
	ours := slices.DeleteFunc(slices.Clone(proxies), func(s string) bool { return s == layer4 || s == haproxy || s == grpcProxy })
	for _, t := range []struct {
		title    string
		subjects []string
		cell     func(*Result) string
	}{
		{"CPU of the proxy, µs for each request, list or event", proxies, func(m *Result) string { return figure(m.ProxyUS) }},
		{"CPU of the proxy ÷ grpc-proxy, ÷ l4 (range), ÷ haproxy, ÷ the other build (range)", ours, func(m *Result) string {
			return m.ProxyToGRPCProxy.short() + "  " + m.ProxyToLayer4.String() + "  " + m.ProxyToHAProxy.short() + "  " + m.ProxyToBase.String()
		}},
		{"Throughput, per second (÷ direct)", r.Subjects, func(m *Result) string {
			return figure(m.PerSecond) + " " + m.PerSecondToDirect.short()
		}},
		{"CPU of client, proxy and etcd together, µs (÷ direct)", r.Subjects, func(m *Result) string {
			return figure(m.TotalUS) + " " + m.TotalToDirect.short()
		}},
		{"Time of an operation added to direct, µs: p50, p99. A watch operation is one write to all its watchers", proxies, func(m *Result) string {
			if m.AddedP50US == nil {
				return ""
			}
			return fmt.Sprintf("%.0f, %.0f", *m.AddedP50US, *m.AddedP99US)
		}},
		{"Objects that the proxy allocates, for each request, list or event", ours, func(m *Result) string {
			if m.Allocations == nil {
				return ""
			}
			return figure(*m.Allocations)
		}},
		{"Peak resident memory of the proxy, MiB", proxies, func(m *Result) string { return figure(m.PeakMiB) }},
	} {
		fmt.Fprintf(out, "\n%s\n", t.title)
		w := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
		for _, s := range t.subjects {
			fmt.Fprintf(w, "\t%s", s)
		}
		fmt.Fprintln(w)
		for _, row := range r.Rows {
			fmt.Fprint(w, row.Name)
			for _, s := range t.subjects {
				fmt.Fprintf(w, "\t%s", t.cell(row.Results[s]))
			}
			fmt.Fprintln(w)
		}
		if err := w.Flush(); err != nil {
			return err
		}
	}
	return nil
}

// String is "0.35 (0.31–0.40)", or "–" for no ratio.
func (r *Ratio) String() string {
	if r == nil {
		return "–"
	}
	return fmt.Sprintf("%.2f (%.2f–%.2f)", r.Median, r.Low, r.High)
}

func (r *Ratio) short() string {
	if r == nil {
		return "–"
	}
	return fmt.Sprintf("%.2f", r.Median)
}

// figure prints three digits or so.
func figure(v float64) string {
	switch {
	case v >= 100:
		return fmt.Sprintf("%.0f", v)
	case v >= 10:
		return fmt.Sprintf("%.1f", v)
	}
	return fmt.Sprintf("%.2f", v)
}
