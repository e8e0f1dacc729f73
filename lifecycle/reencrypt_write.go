package lifecycle

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/cenkalti/backoff/v5"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
)

// Times of the writing.
const (
	txnTimeout = 30 * time.Second
	// slowTxn is how long etcd may take for a transaction before it is given as long a rest.
	slowTxn  = 250 * time.Millisecond
	maxPause = 10 * time.Second
)

// write writes a batch: whole, and where that does not go, in halves.
func (r *run) write(ctx context.Context, batch []item) error {
	if limit := int(r.maxOps.Load()); len(batch) > limit {
		return r.writeParts(ctx, batch, limit)
	}
	if r.cfg.DryRun {
		r.txns.Add(1)
		r.count(batch)
		return nil
	}
	if err := r.limit.WaitN(ctx, min(len(batch), r.cfg.MaxOps)); err != nil {
		return err
	}
	held, err := r.commit(ctx, batch)
	switch {
	case errors.Is(err, rpctypes.ErrTooManyOps) && len(batch) > 1:
		r.maxOps.Store(int64(max(1, len(batch)/2)))
		return r.writeParts(ctx, batch, max(1, len(batch)/2))
	case errors.Is(err, rpctypes.ErrRequestTooLarge) || status.Code(err) == codes.ResourceExhausted && !errors.Is(err, rpctypes.ErrNoSpace):
		if len(batch) > 1 {
			return r.writeParts(ctx, batch, max(1, len(batch)/2))
		}
		r.leave(&r.failed, batch[0].key, fmt.Errorf("etcd refuses it as too large with what sealing adds: raise its --max-request-bytes above %d bytes", batch[0].size()))
		return nil
	case err != nil:
		return err
	case held:
		r.count(batch)
		return nil
	case len(batch) > 1:
		// One of them was written by somebody else. The others are found by halves.
		return r.writeParts(ctx, batch, (len(batch)+1)/2)
	}
	return r.again(ctx, batch[0])
}

func (r *run) writeParts(ctx context.Context, batch []item, size int) error {
	for len(batch) > 0 {
		n := min(size, len(batch))
		if err := r.write(ctx, batch[:n]); err != nil {
			return err
		}
		batch = batch[n:]
	}
	return nil
}

func (r *run) count(batch []item) {
	for i := range batch {
		r.bytes.Add(int64(len(batch[i].key) + len(batch[i].value)))
	}
	r.rewritten.Add(int64(len(batch)))
}

// commit sends one transaction, and reports whether its compares held. It waits while etcd is not there or has no space. After an answer that was lost the
// transaction may have been applied: then its compares do not hold any more, and again finds the value as it is to be.
func (r *run) commit(ctx context.Context, batch []item) (held bool, err error) {
	var compares []clientv3.Cmp
	var puts []clientv3.Op
	for _, i := range batch {
		key := string(i.key)
		compares = append(compares, clientv3.Compare(clientv3.ModRevision(key), "=", i.revision))
		puts = append(puts, clientv3.OpPut(key, string(i.value), clientv3.WithIgnoreLease()))
	}
	err = r.patiently(ctx, waitWrite, func() error {
		limited, cancel := context.WithTimeout(ctx, txnTimeout)
		defer cancel()
		begun := time.Now()
		answer, err := r.cfg.KV.Txn(limited).If(compares...).Then(puts...).Commit()
		if err != nil {
			return err
		}
		if held = answer.Succeeded; held {
			r.txns.Add(1)
		}
		if took := time.Since(begun); took > slowTxn {
			r.pause(waitSlow, "it is given as long to rest after a transaction as it took")
			return rest(ctx, min(took, maxPause))
		}
		return nil
	})
	return held, err
}

// again looks at a single key that was written since it was read.
func (r *run) again(ctx context.Context, i item) error {
	for range maxAttempts {
		var now *clientv3.GetResponse
		err := r.patiently(ctx, waitRead, func() (err error) {
			now, err = r.cfg.KV.Get(ctx, string(i.key))
			return err
		})
		if err != nil {
			return err
		}
		if len(now.Kvs) == 0 {
			r.raced.Add(1)
			return nil // deleted, and stays so
		}
		if bytes.Equal(now.Kvs[0].Value, i.value) {
			r.txns.Add(1)
			r.count([]item{i}) // it was this run's, whose answer was lost
			return nil
		}
		next, left, err := r.renew(ctx, i.rule, now.Kvs[0])
		if err != nil || left {
			return err
		}
		if next == nil {
			r.raced.Add(1)
			return nil
		}
		held, err := r.commit(ctx, []item{*next})
		if err != nil {
			return err
		}
		if held {
			r.count([]item{*next})
			return nil
		}
		i = *next
	}
	r.leave(&r.failed, i.key, errors.New("it is written all the time by somebody who does not seal it as the rule does"))
	return nil
}

// patiently calls f until it succeeds or fails for good, with pauses that grow, and says what it waits for.
func (r *run) patiently(ctx context.Context, what string, f func() error) error {
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval = 100*time.Millisecond, maxPause
	for {
		err := f()
		if err == nil {
			r.pause(what, "")
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		why := passing(err)
		if why == "" {
			return err
		}
		r.pause(what, why)
		if err := rest(ctx, wait.NextBackOff()); err != nil {
			return err
		}
	}
}

// passing says what is wrong if waiting may help, and "" if not.
func passing(err error) string {
	if e, ok := errors.AsType[*keyring.Error](err); ok {
		if e.Kind == keyring.Unavailable {
			return e.Text
		}
		return ""
	}
	if errors.Is(err, rpctypes.ErrNoSpace) {
		return "its space is used up: compact and defragment it (etcdctl compact, etcdctl defrag), then disarm the alarm (etcdctl alarm disarm)"
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return "it does not answer in time"
	}
	code := status.Code(err)
	if ee, ok := errors.AsType[rpctypes.EtcdError](err); ok {
		code = ee.Code()
	}
	switch code {
	case codes.Unavailable, codes.DeadlineExceeded:
		return err.Error()
	case codes.ResourceExhausted:
		if errors.Is(err, rpctypes.ErrTooManyRequests) {
			return err.Error()
		}
	}
	return ""
}

// rest sleeps, or returns why ctx ended.
func rest(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// patientKV reads on when etcd comes back.
type patientKV struct {
	clientv3.KV
	run *run
}

// Get implements [clientv3.KV].
func (p patientKV) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (answer *clientv3.GetResponse, err error) {
	err = p.run.patiently(ctx, waitRead, func() (err error) {
		limited, cancel := context.WithTimeout(ctx, txnTimeout)
		defer cancel()
		answer, err = p.KV.Get(limited, key, opts...)
		return err
	})
	return answer, err
}
