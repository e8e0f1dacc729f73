package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/time/rate"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
)

// ReencryptConfig configures Reencrypt. The zero value of a field is its documented default.
type ReencryptConfig struct {
	KV     clientv3.KV
	Rules  *Rules
	Prefix string // only keys that begin with it
	// Workers is how many transactions are under way at a time; 0 is 2.
	Workers int
	// Rate is how many values are rewritten a second at most; 0 is as many as etcd takes.
	Rate float64
	// MaxOps is etcd's --max-txn-ops, MaxBytes its --max-request-bytes. 0 is etcd's default. Where etcd's are lower, that is found out.
	MaxOps, MaxBytes int
	// DryRun counts what would be written, and writes nothing.
	DryRun bool
	// Progress is told after each transaction and each page, on several goroutines. May be nil.
	Progress func(Progress)
	// Left is told of each key that cannot be rewritten, and why, on several goroutines. May be nil.
	Left func(key string, why error)
	// Paused is told what the run waits for, and why, and "" when it goes on, on several goroutines. May be nil.
	Paused func(what, why string)
}

// Progress is what a run has done so far.
type Progress struct {
	Keys          int64 `json:"keys"`          // looked at
	Current       int64 `json:"current"`       // are as their rules write them
	Rewritten     int64 `json:"rewritten"`     // of Keys; with DryRun: would be
	Bytes         int64 `json:"bytes"`         // of their keys and new values: what the database grows by at least
	Transactions  int64 `json:"transactions"`  // that is, revisions of etcd
	Raced         int64 `json:"raced"`         // were written or deleted by somebody else meanwhile
	Foreign       int64 `json:"foreign"`       // left: sealed by a provider that the rule does not read
	Undecryptable int64 `json:"undecryptable"` // left: they do not open
	Failed        int64 `json:"failed"`        // left: etcd does not take them
}

// Left is how many values are not as their rules write them.
func (p *Progress) Left() int64 { return p.Foreign + p.Undecryptable + p.Failed }

// Result is what a run has done.
type Result struct {
	Progress
	Revisions Span          `json:"revisions"` // that were looked at
	Duration  time.Duration `json:"-"`
}

const (
	defaultWorkers  = 2
	defaultMaxOps   = 128
	defaultMaxBytes = 1536 << 10
	opOverhead      = 64 // bytes of a compare and a put in a transaction, beside the key twice and the value
	maxAttempts     = 10 // at one key that others keep writing; they write it as the rule does
)

// Reencrypt brings every value under rules to what its rule writes now: by one transaction for many values, each of which holds only if none of them was written
// since it was read. So a concurrent write always wins, and ending the process at any time leaves each value as it was or as it is to be. Leases stay. It returns
// when it has looked at every key once, with the error of ctx if that ended before, and whatever was done so far.
//
// It waits, and says so, while etcd or a KMS is not there, and while etcd has no space; it gives up when a KMS key may not be used.
func Reencrypt(ctx context.Context, c ReencryptConfig) (Result, error) {
	r := newRun(c)
	begun := time.Now()
	span, err := r.run(ctx)
	result := Result{Progress: r.progress(), Revisions: span, Duration: time.Since(begun)}
	if err != nil {
		return result, fmt.Errorf("re-encrypt: %w", err)
	}
	return result, nil
}

// item is a value to write.
type item struct {
	rule     *Rule
	key      []byte
	value    []byte // sealed anew
	revision int64  // that wrote the old one
}

func (i *item) size() int { return 2*len(i.key) + len(i.value) + opOverhead }

// run is one run of Reencrypt.
type run struct {
	cfg     ReencryptConfig
	limit   *rate.Limiter
	maxOps  atomic.Int64
	batches chan []item

	keys, current, rewritten, bytes, txns, raced, foreign, undecryptable, failed atomic.Int64

	mu     sync.Mutex
	paused map[string]string // by what is waited for, why
}

func newRun(c ReencryptConfig) *run {
	if c.Workers <= 0 {
		c.Workers = defaultWorkers
	}
	if c.MaxOps <= 0 {
		c.MaxOps = defaultMaxOps
	}
	if c.MaxBytes <= 0 {
		c.MaxBytes = defaultMaxBytes
	}
	r := &run{cfg: c, limit: rate.NewLimiter(rate.Inf, 0), batches: make(chan []item), paused: make(map[string]string)}
	if c.Rate > 0 {
		r.limit = rate.NewLimiter(rate.Limit(c.Rate), c.MaxOps)
	}
	r.maxOps.Store(int64(c.MaxOps))
	return r
}

func (r *run) progress() Progress {
	return Progress{
		Keys: r.keys.Load(), Current: r.current.Load(), Rewritten: r.rewritten.Load(), Bytes: r.bytes.Load(), Transactions: r.txns.Load(), Raced: r.raced.Load(),
		Foreign: r.foreign.Load(), Undecryptable: r.undecryptable.Load(), Failed: r.failed.Load(),
	}
}

func (r *run) tell() {
	if r.cfg.Progress != nil {
		r.cfg.Progress(r.progress())
	}
}

func (r *run) leave(counter *atomic.Int64, key []byte, why error) {
	counter.Add(1)
	if r.cfg.Left != nil {
		r.cfg.Left(string(key), why)
	}
}

// pause tells why the run waits for something, when that changes; "" is that it goes on.
func (r *run) pause(what, why string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.paused[what] != why && r.cfg.Paused != nil {
		r.cfg.Paused(what, why)
	}
	r.paused[what] = why
}

// run scans, and has workers write what the scan finds.
func (r *run) run(ctx context.Context) (Span, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	var workers sync.WaitGroup
	for range r.cfg.Workers {
		workers.Go(func() {
			for batch := range r.batches {
				if err := r.write(ctx, batch); err != nil {
					cancel(err)
				}
				r.tell()
			}
		})
	}
	span, err := r.scan(ctx)
	close(r.batches)
	workers.Wait()
	if cause := context.Cause(ctx); cause != nil {
		err = cause // of a worker, or the caller's
	}
	return span, err
}

// scan hands what is to be written to the workers, in batches.
func (r *run) scan(ctx context.Context) (Span, error) {
	var batch []item
	size := 0
	flush := func() error {
		if len(batch) == 0 {
			return nil
		}
		select {
		case r.batches <- batch:
			batch, size = nil, 0
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	kv := patientKV{KV: r.cfg.KV, run: r}
	span, err := Scan(ctx, kv, within(r.cfg.Rules.Prefixes(), r.cfg.Prefix), 0, func(kv *mvccpb.KeyValue) error {
		rule := r.cfg.Rules.Of(kv.Key)
		if rule == nil {
			return nil
		}
		r.keys.Add(1)
		next, left, err := r.renew(ctx, rule, kv)
		if err != nil || left {
			return err
		}
		if next == nil {
			r.current.Add(1)
			return nil
		}
		if len(batch) >= int(r.maxOps.Load()) || len(batch) > 0 && size+next.size() > r.cfg.MaxBytes*9/10 {
			if err := flush(); err != nil {
				return err
			}
		}
		batch, size = append(batch, *next), size+next.size()
		return nil
	})
	if err != nil {
		return span, err
	}
	return span, flush()
}

// within returns what the prefixes and one more have in common, as prefixes.
func within(prefixes []string, also string) []string {
	var both []string
	for _, p := range prefixes {
		switch {
		case strings.HasPrefix(p, also):
			both = append(both, p)
		case strings.HasPrefix(also, p):
			both = append(both, also)
		}
	}
	return both
}

// What a run waits for, as Paused says it.
const (
	waitKMS   = "the KMS"
	waitRead  = "reading from etcd"
	waitWrite = "writing to etcd"
	waitSlow  = "etcd is slow"
)

// renew returns what to write in place of a value: nil if it is current, or if it is left as it is, which it then has told. It waits for a KMS that does not answer.
func (r *run) renew(ctx context.Context, rule *Rule, kv *mvccpb.KeyValue) (next *item, left bool, err error) {
	leave := func(counter *atomic.Int64, why error) {
		r.leave(counter, kv.Key, why)
		left = true
	}
	err = r.patiently(ctx, waitKMS, func() error {
		plaintext, standing, err := rule.Sealer.Inspect(ctx, kv.Key, kv.Value)
		e, _ := errors.AsType[*keyring.Error](err)
		switch {
		case e != nil && e.Kind == keyring.Unavailable:
			return err
		case err != nil:
			leave(&r.undecryptable, err)
			return nil
		case standing == keyring.Current:
			return nil
		case standing == keyring.Foreign:
			leave(&r.foreign, errors.New("it was sealed by a provider that the rule does not read"))
			return nil
		}
		value, err := rule.Sealer.Seal(ctx, kv.Key, plaintext)
		if e, _ := errors.AsType[*keyring.Error](err); e != nil && e.Kind == keyring.Refused {
			leave(&r.failed, err)
			return nil
		}
		if err != nil {
			return err
		}
		next = &item{rule, kv.Key, value, kv.ModRevision}
		return nil
	})
	return next, left, err
}

// And adds what a later pass has done. What both looked at counts as the later one found it.
func (r Result) And(later Result) Result {
	sum := later
	sum.Rewritten += r.Rewritten
	sum.Current -= r.Rewritten // they were rewritten, and so found
	sum.Bytes += r.Bytes
	sum.Transactions += r.Transactions
	sum.Raced += r.Raced
	sum.Duration += r.Duration
	if r.Revisions.First > 0 {
		sum.Revisions.First = r.Revisions.First
	}
	return sum
}
