package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"net/http"
	"os"
	"regexp"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// sample is one measurement of one row on one subject.
type sample struct {
	units     int
	elapsed   time.Duration
	p50, p99  time.Duration // of an operation
	proxy     time.Duration // CPU time; 0 where there is no proxy
	etcd      time.Duration
	client    time.Duration
	allocated float64 // objects that the proxy allocated; NaN where it does not say
	peak      int64   // most resident memory of the proxy, bytes
}

// run measures everything and returns the report: the rows in cleartext first, then those over TLS.
func run(ctx context.Context, cfg config) (*Report, error) {
	chosen, err := regexp.Compile(cfg.Rows)
	if err != nil {
		return nil, fmt.Errorf("choose rows: %w", err)
	}
	report := newReport(cfg)
	for _, secure := range []bool{false, true} {
		var rs []row
		for _, r := range rows(cfg) {
			if r.secure == secure && chosen.MatchString(r.name) {
				rs = append(rs, r)
				report.Rows = append(report.Rows, &Row{Name: r.name, Unit: r.unit, Clients: r.clients, Results: map[string]*Result{}})
			}
		}
		if len(rs) == 0 {
			continue
		}
		if err := runBed(ctx, cfg, secure, rs, report); err != nil {
			return nil, err
		}
	}
	if len(report.Rows) == 0 {
		return nil, errors.New("choose rows: the regular expression matches none")
	}
	report.finish()
	return report, nil
}

// runBed measures the rows of one transport.
func runBed(ctx context.Context, cfg config, secure bool, rs []row, report *Report) error {
	b, err := newBed(ctx, cfg, secure)
	if err != nil {
		return err
	}
	defer b.close()
	filled := map[string]bool{}
	for _, s := range b.subjects {
		if !filled[s.prefix] {
			filled[s.prefix] = true
			if err := b.fill(ctx, s, rs); err != nil {
				return err
			}
		}
	}
	for round := range cfg.Rounds {
		for _, r := range rs {
			fmt.Fprintf(cfg.Progress, "round %d of %d: %s\n", round+1, cfg.Rounds, r.name)
			// The subject that goes first changes with the round.
			for i := range b.subjects {
				s := b.subjects[(i+round)%len(b.subjects)]
				m, err := b.measure(ctx, r, s)
				if err != nil {
					return fmt.Errorf("measure %q on %s: %w", r.name, s.name, err)
				}
				report.row(r.name).add(s.name, m)
			}
		}
		if err := b.compact(ctx); err != nil {
			return err
		}
	}
	return nil
}

// compact forgets the revisions that a round has written.
func (b *bed) compact(ctx context.Context) error {
	now, err := b.direct.Get(ctx, "mark")
	if err == nil {
		_, err = b.direct.Compact(ctx, now.Header.Revision)
	}
	// rows that only read leave nothing to forget
	if err != nil && !errors.Is(err, rpctypes.ErrCompacted) {
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
	if s.process != nil {
		if err := resetPeakMemory(s.process.pid()); err != nil {
			return m, err
		}
	}
	if _, _, err := drive(ctx, w, r.clients, b.cfg.Duration/10); err != nil {
		return m, err
	}
	runtime.GC() // of the warm-up's garbage, or it is collected at another subject's expense
	pids := []int{os.Getpid(), b.etcd.pid()}
	if s.process != nil {
		pids = append(pids, s.process.pid())
	}
	allocated, err := allocations(ctx, s.admin)
	if err != nil {
		return m, err
	}
	before, err := cpuTimes(pids)
	if err != nil {
		return m, err
	}
	if err := b.profile(s); err != nil {
		return m, err
	}
	start := time.Now()
	var latencies []time.Duration
	if m.units, latencies, err = drive(ctx, w, r.clients, b.cfg.Duration); err != nil {
		return m, err
	}
	m.elapsed = time.Since(start)
	if err := b.profile(s); err != nil {
		return m, err
	}
	after, err := cpuTimes(pids)
	if err != nil {
		return m, err
	}
	if m.allocated, err = allocations(ctx, s.admin); err != nil {
		return m, err
	}
	m.allocated -= allocated
	m.client, m.etcd = after[0]-before[0], after[1]-before[1]
	if s.process != nil {
		m.proxy = after[2] - before[2]
		if m.peak, err = peakMemory(s.process.pid()); err != nil {
			return m, err
		}
	}
	slices.Sort(latencies)
	m.p50, m.p99 = latencies[len(latencies)/2], latencies[len(latencies)*99/100]
	return m, nil
}

// profile starts the profile of a proxy, or writes it, if profiles are wanted.
func (b *bed) profile(s *subject) error {
	if b.cfg.Profile == "" || s.process == nil {
		return nil
	}
	if err := s.process.cmd.Process.Signal(syscall.SIGUSR1); err != nil {
		return fmt.Errorf("profile %s: %w", s.name, err)
	}
	return nil
}

// allocations is how many objects a proxy has allocated since it started, as its metrics say; NaN
// for a subject without metrics.
func allocations(ctx context.Context, admin string) (float64, error) {
	if admin == "" {
		return math.NaN(), nil
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+admin+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, fmt.Errorf("read metrics: %w", err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		return 0, fmt.Errorf("read metrics: %w", err)
	}
	const name = "\ngo_memstats_mallocs_total "
	_, rest, found := strings.Cut(string(text), name)
	if !found {
		return 0, errors.New("read metrics: go_memstats_mallocs_total is missing")
	}
	figure, _, _ := strings.Cut(rest, "\n")
	return strconv.ParseFloat(figure, 64)
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

// drive has every client do one operation after the other for a while, at least one. All operations
// have ended when it returns, so what was counted is what has cost.
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
