package reencrypt

import (
	"context"
	"sync"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"golang.org/x/sync/errgroup"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/restore"
)

// run is the state of one call of [Run].
type run struct {
	cfg    Config
	limits limits
	pace   *pace
	// history has observed every response to the reads of the run.
	history restore.Detector

	begin    func() error // calls Config.Begin once
	deferred *deferredList
	tally
	waits
}

func newRun(c Config) *run {
	for field, fallback := range map[*int]int{&c.Workers: defaultWorkers, &c.TxnKeys: 1, &c.Passes: defaultPasses, &c.MaxBytes: defaultMaxBytes} {
		if *field <= 0 {
			*field = fallback
		}
	}
	if c.Begin == nil {
		c.Begin = func() error { return nil }
	}
	r := &run{cfg: c, begin: sync.OnceValue(c.Begin), waits: newWaits(c.Paused), deferred: newDeferredList()}
	r.limits.set(c.TxnKeys, c.MaxBytes)
	paused := pause{waits: &r.waits, what: waitSlow}
	r.pace = newPace(c.Rate, c.TxnKeys, func(slow bool) {
		if slow {
			paused.report("fewer values per second are rewritten until it is faster")
		} else {
			paused.end()
		}
	})
	return r
}

func (r *run) report() {
	if r.cfg.Progress != nil {
		r.cfg.Progress(r.progress())
	}
}

// pass makes one pass over all keys, and reports whether it found anything to do.
func (r *run) pass(ctx context.Context) (again bool, err error) {
	r.beginPass()
	group, working := errgroup.WithContext(ctx)
	feed := make(chan *mvccpb.KeyValue)
	for range r.cfg.Workers {
		group.Go(func() error { return r.work(working, feed) })
	}
	group.Go(func() error {
		defer close(feed)
		span, err := r.scan(working, feed)
		r.hasRead(span)
		return err
	})
	if err = group.Wait(); err == nil {
		err = r.settle(ctx)
	}
	r.report()
	if cause := context.Cause(ctx); cause != nil {
		return false, cause
	}
	return r.needsAnother(), err
}

// scan reads all keys and hands them to the workers.
func (r *run) scan(ctx context.Context, feed chan<- *mvccpb.KeyValue) (inventory.Span, error) {
	return inventory.ScanWith(ctx, &r.history, retryingKV{KV: r.cfg.Client, run: r}, r.cfg.Rules().Within(r.cfg.Prefix), 0, func(kv *mvccpb.KeyValue) error {
		select {
		case feed <- kv:
			return nil
		case <-ctx.Done():
			return context.Cause(ctx)
		}
	})
}

// batchAge is how long a batch waits to be filled.
const batchAge = time.Second

// work rewrites the values received from feed that need it, in batches.
func (r *run) work(ctx context.Context, feed <-chan *mvccpb.KeyValue) error {
	var b batch
	flush := func() error {
		err := r.store(ctx, b.take())
		r.report()
		return err
	}
	tick := time.NewTicker(batchAge)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-tick.C:
			if err := flush(); err != nil {
				return err
			}
		case kv, more := <-feed:
			if !more {
				return flush()
			}
			next, err := r.first(ctx, kv)
			if err != nil {
				return err
			}
			if r.deferred.full() {
				if err := r.settle(ctx); err != nil {
					return err
				}
			}
			if next == nil {
				continue
			}
			if !r.limits.allow(&b, next) {
				if err := flush(); err != nil {
					return err
				}
			}
			if b.add(next); len(b.items) >= r.limits.maxKeys() {
				if err := flush(); err != nil {
					return err
				}
			}
		}
	}
}

// first processes a key for the first time in this pass.
func (r *run) first(ctx context.Context, kv *mvccpb.KeyValue) (*item, error) {
	f, err := r.renew(ctx, kv, true)
	if err != nil || f.what == noRule {
		return nil, err
	}
	if f.what == isDeferred {
		r.deferred.add(f.deferred)
	}
	r.count(func(p *Progress) {
		p.Keys++
		if f.what == isCurrent && p.Pass == 1 {
			p.Current++
		}
	})
	return f.next, nil
}
