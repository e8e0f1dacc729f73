package main

import (
	"fmt"
	"io"
	"runtime"
	"slices"
	"text/tabwriter"
	"time"
)

// Report is the result of a run.
type Report struct {
	CPUs          int                `json:"cpus"`
	Go            string             `json:"go"`
	CPUSource     string             `json:"cpuSource"`
	Rounds        int                `json:"rounds"`
	Seconds       float64            `json:"seconds"` // of each measurement
	Connections   int                `json:"connections"`
	Subjects      []string           `json:"subjects"`
	Rows          []*Row             `json:"rows"`
	PeakMemoryMiB map[string]float64 `json:"peakMemoryMiB"` // resident, of the proxies' processes
}

// Row is one thing that was measured, on every subject.
type Row struct {
	Name    string             `json:"name"`
	Unit    string             `json:"unit"` // request, list or event
	Clients int                `json:"clients"`
	Results map[string]*Result `json:"results"` // by subject
}

// Result is a row's best rounds on one subject. CPU times are µs per unit: the least of all rounds, each process for itself.
type Result struct {
	PerSecond float64 `json:"perSecond"` // units, of the fastest round
	MedianUS  float64 `json:"medianMicroseconds"`
	ProxyUS   float64 `json:"proxyCPUMicroseconds,omitempty"`
	EtcdUS    float64 `json:"etcdCPUMicroseconds"`
	ClientUS  float64 `json:"clientCPUMicroseconds"`
	TotalUS   float64 `json:"totalCPUMicroseconds"` // of all three in the same round

	// Ratios; 0 where the other subject was not measured.
	ProxyToGRPCProxy  float64 `json:"proxyCPUToGRPCProxy,omitempty"`
	ProxyToLayer4     float64 `json:"proxyCPUToLayer4,omitempty"`
	TotalToDirect     float64 `json:"totalCPUToDirect,omitempty"`
	PerSecondToDirect float64 `json:"perSecondToDirect,omitempty"`
	AddedToGRPCProxy  float64 `json:"addedMedianToGRPCProxy,omitempty"` // the time added to direct's median, as a share of what grpc-proxy adds
	AddedMicroseconds float64 `json:"addedMedianMicroseconds,omitempty"`
}

func newReport(cfg config) *Report {
	return &Report{CPUs: runtime.NumCPU(), Go: runtime.Version(), CPUSource: cpuSource(), Rounds: cfg.Rounds, Seconds: cfg.Duration.Seconds(),
		Connections: cfg.Conns, Subjects: cfg.Subjects, PeakMemoryMiB: map[string]float64{}}
}

func (r *Report) row(name string) *Row {
	for _, row := range r.Rows {
		if row.Name == name {
			return row
		}
	}
	return nil
}

// add takes a round in.
func (r *Row) add(subject string, m sample) {
	if r.Results == nil {
		r.Results = map[string]*Result{}
	}
	per := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 / float64(m.units) }
	now := Result{PerSecond: float64(m.units) / m.elapsed.Seconds(), MedianUS: float64(m.median.Nanoseconds()) / 1e3,
		ProxyUS: per(m.proxy), EtcdUS: per(m.etcd), ClientUS: per(m.client), TotalUS: per(m.proxy + m.etcd + m.client)}
	best := r.Results[subject]
	if best == nil {
		r.Results[subject] = &now
		return
	}
	best.PerSecond = max(best.PerSecond, now.PerSecond)
	best.MedianUS = min(best.MedianUS, now.MedianUS)
	best.ProxyUS = min(best.ProxyUS, now.ProxyUS)
	best.EtcdUS = min(best.EtcdUS, now.EtcdUS)
	best.ClientUS = min(best.ClientUS, now.ClientUS)
	best.TotalUS = min(best.TotalUS, now.TotalUS)
}

// finish computes the ratios.
func (r *Report) finish(subjects []string) {
	for _, row := range r.Rows {
		base, relay, grpc := row.Results[direct], row.Results[layer4], row.Results[grpcProxy]
		for _, name := range subjects {
			res := row.Results[name]
			if base != nil {
				res.TotalToDirect, res.PerSecondToDirect = res.TotalUS/base.TotalUS, res.PerSecond/base.PerSecond
			}
			if name == direct {
				continue
			}
			if grpc != nil {
				res.ProxyToGRPCProxy = res.ProxyUS / grpc.ProxyUS
			}
			if relay != nil {
				res.ProxyToLayer4 = res.ProxyUS / relay.ProxyUS
			}
			if base != nil {
				res.AddedMicroseconds = res.MedianUS - base.MedianUS
			}
			if base != nil && grpc != nil && grpc.MedianUS > base.MedianUS && res.MedianUS > base.MedianUS {
				res.AddedToGRPCProxy = res.AddedMicroseconds / (grpc.MedianUS - base.MedianUS)
			}
		}
	}
}

// print writes the report as tables.
func (r *Report) print(out io.Writer) error {
	fmt.Fprintf(out, "%d CPUs, %s; best of %d rounds of %gs, subjects in turns; clients of a row share %d connection(s)\nCPU time: %s\n",
		r.CPUs, r.Go, r.Rounds, r.Seconds, r.Connections, r.CPUSource)
	fmt.Fprintf(out, "%s: a TCP relay in Go; %s: etcd's own; %s and %s: etcd-kms-proxy without and with a rule for the keys\n", layer4, grpcProxy, passing, sealing)
	proxies := slices.DeleteFunc(slices.Clone(r.Subjects), func(s string) bool { return s == direct })
	for _, t := range []struct {
		title    string
		subjects []string
		cell     func(*Result) string
	}{
		{"CPU of the proxy, µs for each request, list or event (x grpc-proxy, x l4)", proxies, func(m *Result) string {
			return fmt.Sprintf("%s%s%s", figure(m.ProxyUS), times(m.ProxyToGRPCProxy), times(m.ProxyToLayer4))
		}},
		{"Throughput, per second (x direct)", r.Subjects, func(m *Result) string {
			return figure(m.PerSecond) + times(m.PerSecondToDirect)
		}},
		{"CPU of client, proxy and etcd together, µs (x direct)", r.Subjects, func(m *Result) string {
			return figure(m.TotalUS) + times(m.TotalToDirect)
		}},
		{"Median time of an operation, µs; a watch operation is one write to all its watchers (x what grpc-proxy adds)", r.Subjects, func(m *Result) string {
			return figure(m.MedianUS) + times(m.AddedToGRPCProxy)
		}},
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
	fmt.Fprint(out, "\nPeak resident memory, MiB:")
	for _, s := range proxies {
		fmt.Fprintf(out, "  %s %.0f", s, r.PeakMemoryMiB[s])
	}
	fmt.Fprintln(out)
	return r.verdict(out)
}

// verdict says in one line how etcd-kms-proxy stands to grpc-proxy.
func (r *Report) verdict(out io.Writer) error {
	if !slices.Contains(r.Subjects, grpcProxy) {
		return nil
	}
	compared, above := 0, []string(nil)
	for _, row := range r.Rows {
		for _, s := range []string{passing, sealing} {
			if res := row.Results[s]; res != nil {
				compared++
				if res.ProxyToGRPCProxy >= 1 {
					above = append(above, fmt.Sprintf("%s (%s, x%.2f)", row.Name, s, res.ProxyToGRPCProxy))
				}
			}
		}
	}
	if compared == 0 {
		return nil
	}
	if len(above) == 0 {
		_, err := fmt.Fprintf(out, "\netcd-kms-proxy takes less CPU than grpc-proxy in all %d cells.\n", compared)
		return err
	}
	_, err := fmt.Fprintf(out, "\netcd-kms-proxy takes more CPU than grpc-proxy in %d of %d cells: %q\n", len(above), compared, above)
	return err
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

func times(v float64) string {
	if v == 0 {
		return ""
	}
	return fmt.Sprintf(" x%.2f", v)
}
