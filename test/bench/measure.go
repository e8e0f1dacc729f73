package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"regexp"
	"runtime"
	"slices"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// sample is one measurement of one row on one subject.
type sample struct {
	units   int
	elapsed time.Duration
	median  time.Duration // of an operation
	proxy   time.Duration // CPU time; 0 where there is no proxy
	etcd    time.Duration
	client  time.Duration
}

// run measures everything and returns the report.
func run(ctx context.Context, cfg config) (*Report, error) {
	b, err := newBed(ctx, cfg)
	if err != nil {
		return nil, err
	}
	defer b.close()
	filled := map[string]bool{}
	for _, s := range b.subjects {
		if !filled[s.prefix] {
			filled[s.prefix] = true
			if err := b.fill(ctx, s); err != nil {
				return nil, err
			}
		}
	}
	chosen, err := regexp.Compile(cfg.Rows)
	if err != nil {
		return nil, fmt.Errorf("choose rows: %w", err)
	}
	report := newReport(cfg)
	for _, r := range rows(cfg) {
		if chosen.MatchString(r.name) {
			report.Rows = append(report.Rows, &Row{Name: r.name, Unit: r.unit, Clients: r.clients})
		}
	}
	if len(report.Rows) == 0 {
		return nil, errors.New("choose rows: the regular expression fits none")
	}
	for round := range cfg.Rounds {
		for _, r := range rows(cfg) {
			line := report.row(r.name)
			if line == nil {
				continue
			}
			fmt.Fprintf(cfg.Progress, "round %d of %d: %s\n", round+1, cfg.Rounds, r.name)
			// Who goes first changes with the round.
			for i := range b.subjects {
				s := b.subjects[(i+round)%len(b.subjects)]
				m, err := b.measure(ctx, r, s)
				if err != nil {
					return nil, fmt.Errorf("measure %q on %s: %w", r.name, s.name, err)
				}
				line.add(s.name, m)
			}
		}
		if err := b.compact(ctx); err != nil {
			return nil, err
		}
	}
	for _, s := range b.subjects {
		if s.process == nil {
			continue
		}
		peak, err := peakMemory(s.process.pid())
		if err != nil {
			return nil, err
		}
		report.PeakMemoryMiB[s.name] = float64(peak) / (1 << 20)
	}
	report.finish(cfg.Subjects)
	return report, nil
}

// compact forgets the revisions that a round has written.
func (b *bed) compact(ctx context.Context) error {
	now, err := b.direct.Get(ctx, "mark")
	if err == nil {
		_, err = b.direct.Compact(ctx, now.Header.Revision)
	}
	if err != nil && !errors.Is(err, rpctypes.ErrCompacted) { // rows that only read leave nothing to forget
		return fmt.Errorf("compact: %w", err)
	}
	return nil
}

// measure runs a row on a subject, once to warm up and once for the record.
func (b *bed) measure(ctx context.Context, r row, s *subject) (m sample, err error) {
	w, err := r.open(ctx, b, s, r.clients)
	if err != nil {
		return m, err
	}
	defer w.close()
	if _, _, err := drive(ctx, w, r.clients, b.cfg.Duration/10); err != nil {
		return m, err
	}
	runtime.GC() // of the warm-up's garbage, or it is collected at some other subject's expense
	pids := []int{os.Getpid(), b.etcd.pid()}
	if s.process != nil {
		pids = append(pids, s.process.pid())
	}
	before, err := cpuTimes(pids)
	if err != nil {
		return m, err
	}
	start := time.Now()
	var latencies []time.Duration
	if m.units, latencies, err = drive(ctx, w, r.clients, b.cfg.Duration); err != nil {
		return m, err
	}
	m.elapsed = time.Since(start)
	after, err := cpuTimes(pids)
	if err != nil {
		return m, err
	}
	m.client, m.etcd = after[0]-before[0], after[1]-before[1]
	if len(pids) > 2 {
		m.proxy = after[2] - before[2]
	}
	slices.Sort(latencies)
	m.median = latencies[len(latencies)/2]
	return m, nil
}

func cpuTimes(pids []int) ([]time.Duration, error) {
	times := make([]time.Duration, len(pids))
	for i, pid := range pids {
		var err error
		if times[i], err = cpuTime(pid); err != nil {
			return nil, err
		}
	}
	return times, nil
}

// drive has every client do one operation after the other for a while, at least one. All operations have ended when it returns, so what was
// counted is what has cost.
func drive(ctx context.Context, w *workload, clients int, d time.Duration) (units int, latencies []time.Duration, err error) {
	var mu sync.Mutex
	err = together(clients, func(client int) error {
		sum, own := 0, make([]time.Duration, 0, 1024)
		for start, now := time.Now(), time.Now(); ; {
			n, err := w.do(ctx, client)
			if err != nil {
				return err
			}
			then := time.Now()
			own = append(own, then.Sub(now))
			sum, now = sum+n, then
			if now.Sub(start) >= d {
				break
			}
		}
		mu.Lock()
		defer mu.Unlock()
		units += sum
		latencies = append(latencies, own...)
		return nil
	})
	return units, latencies, err
}

// together runs n calls at once, waits for all and joins their errors.
func together(n int, do func(i int) error) error {
	errs := make([]error, n)
	var wg sync.WaitGroup
	for i := range n {
		wg.Go(func() { errs[i] = do(i) })
	}
	wg.Wait()
	return errors.Join(errs...)
}
