package reencrypt

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/restore"
)

// Limits of writing a value.
const (
	txnTimeout  = 30 * time.Second
	txnGrace    = 5 * time.Second // for a transaction in flight when the run ends
	maxAttempts = 10              // for a key that other clients keep writing
)

// store writes items in one or more transactions. Items that another client has written since are
// processed again, one by one.
func (r *run) store(ctx context.Context, items []*item) error {
	if len(items) == 0 {
		return nil
	}
	if r.cfg.DryRun {
		r.wrote(items, 0)
		return nil
	}
	if err := r.begin(); err != nil {
		return err
	}
	for _, part := range r.limits.parts(items) {
		if err := r.storePart(ctx, part); err != nil {
			return err
		}
	}
	return nil
}

// storePart writes items in one transaction, or handles its failure.
func (r *run) storePart(ctx context.Context, items []*item) error {
	response, err := r.commit(ctx, items)
	switch {
	case err == nil && response.Succeeded:
		r.wrote(items, response.Header.Revision)
		return nil
	case err == nil:
		return r.again(ctx, items, response)
	case len(items) > 1 && errors.Is(err, rpctypes.ErrTooManyOps):
		r.limits.fewerKeys(len(items))
	case len(items) > 1 && tooLarge(err):
		r.limits.fewerBytes(sizeOf(items))
	case len(items) > 1 && (errors.Is(err, rpctypes.ErrLeaseNotFound) || codeOf(err) == codes.PermissionDenied):
		// The error is about one of them.
		for _, i := range items {
			if err := r.storePart(ctx, []*item{i}); err != nil {
				return err
			}
		}
		return nil
	case len(items) > 1:
		return err
	default:
		return r.refused(ctx, items[0], err)
	}
	return r.store(ctx, items)
}

// refused handles a single item that etcd refuses. A failure that concerns every key is returned as
// an error.
func (r *run) refused(ctx context.Context, i *item, err error) error {
	key := []byte(i.key)
	switch {
	case tooLarge(err):
		r.skip(skippedFailed, key, fmt.Sprintf("etcd refuses it as too large with the size that encryption adds: raise etcd's --max-request-bytes above %d", i.size()+512))
	case errors.Is(err, rpctypes.ErrLeaseNotFound):
		// The lease has expired, and the key with it. If the key still exists, etcd has lost the
		// lease: a put that kept it would crash etcd's members.
		now, err := retryingKV{KV: r.cfg.Client, run: r}.Get(ctx, i.key)
		if err != nil {
			return err
		}
		if len(now.Kvs) == 0 {
			r.count(func(p *Progress) { p.Raced++ })
			return nil
		}
		if now.Kvs[0].ModRevision != i.revision {
			return r.renewed(ctx, i, now.Kvs[0])
		}
		r.skip(skippedFailed, key, fmt.Sprintf("etcd does not know its lease %x: write it again, or delete it", i.lease))
	case codeOf(err) == codes.PermissionDenied && i.lease != 0:
		r.skip(skippedFailed, key, fmt.Sprintf("etcd denies it: etcd.username must be able to write all keys of the lease %x", i.lease))
	default:
		return err
	}
	return nil
}

// commit sends one transaction that writes items if none of their keys was written since it was
// read, and reads them otherwise. It waits while etcd is unavailable or has no space. If a response
// was lost, the transaction may have been applied: then the compare fails the next time, and the
// values read are those of the items.
//
// After an outage, etcd may have been restored, and another value can have the revision that was
// read. Then the error is [restore.ErrRestored].
//
// The lease is that of the key at its revision, and therefore the current one. The option to keep
// the lease of a key would be shorter, but crashes each member of an etcd that has lost this lease.
// With an explicit lease, etcd responds that the lease does not exist.
func (r *run) commit(ctx context.Context, items []*item) (response *clientv3.TxnResponse, err error) {
	compares, puts, gets := make([]clientv3.Cmp, len(items)), make([]clientv3.Op, len(items)), make([]clientv3.Op, len(items))
	for n, i := range items {
		compares[n] = clientv3.Compare(clientv3.ModRevision(i.key), "=", i.revision)
		puts[n] = clientv3.OpPut(i.key, string(i.value), clientv3.WithLease(clientv3.LeaseID(i.lease)))
		gets[n] = clientv3.OpGet(i.key)
	}
	failed := false
	err = r.retry(ctx, waitWrite, func() error {
		if failed {
			if err := r.sameHistory(ctx, items[0].key); err != nil {
				return err
			}
		}
		failed = true
		if err := r.pace.wait(ctx, len(items)); err != nil {
			return err
		}
		sending, done := finishing(ctx)
		defer done()
		begun := time.Now()
		response, err = r.cfg.Client.Txn(sending).If(compares...).Then(puts...).Else(gets...).Commit()
		if err == nil {
			r.pace.took(time.Since(begun), len(items))
		}
		return err
	})
	return response, err
}

// sameHistory returns an error if etcd was restored since the last read of the run, or does not
// respond.
func (r *run) sameHistory(ctx context.Context, key string) error {
	ctx, cancel := context.WithTimeout(ctx, txnTimeout)
	defer cancel()
	restored, _, _, err := r.history.Check(ctx, r.cfg.Client, key)
	if err == nil && restored {
		err = restore.ErrRestored
	}
	return err
}

// finishing returns a context for a transaction that outlives ctx for a short time, so that the
// outcome of the transaction is known.
func finishing(ctx context.Context) (context.Context, func()) {
	limited, cancel := context.WithTimeout(context.WithoutCancel(ctx), txnTimeout)
	stop := context.AfterFunc(ctx, func() { time.AfterFunc(txnGrace, cancel) })
	return limited, func() {
		stop()
		cancel()
	}
}

// again processes items of a transaction that did not apply, because another client has written at
// least one of them. It writes the others together.
func (r *run) again(ctx context.Context, items []*item, response *clientv3.TxnResponse) error {
	var same, ours []*item
	changed := make(map[*item]*mvccpb.KeyValue)
	for n, i := range items {
		now := only(response.Responses[n].GetResponseRange())
		switch {
		case now == nil: // deleted
			r.count(func(p *Progress) { p.Raced++ })
		case now.ModRevision == i.revision:
			same = append(same, i)
		case bytes.Equal(now.Value, []byte(i.value)):
			ours = append(ours, i) // of an attempt whose answer was lost
		default:
			r.count(func(p *Progress) { p.Raced++ })
			changed[i] = now
		}
	}
	if len(ours) > 0 {
		r.wrote(ours, response.Header.Revision)
	}
	if err := r.store(ctx, same); err != nil {
		return err
	}
	for i, now := range changed {
		if err := r.renewed(ctx, i, now); err != nil {
			return err
		}
	}
	return nil
}

func only(r *pb.RangeResponse) *mvccpb.KeyValue {
	if r == nil || len(r.Kvs) == 0 {
		return nil
	}
	return r.Kvs[0]
}

// renewed continues with an item that another client has written.
func (r *run) renewed(ctx context.Context, i *item, now *mvccpb.KeyValue) error {
	f, err := r.renew(ctx, now, true)
	switch {
	case err != nil:
		return err
	case f.what == isDeferred:
		r.deferred.add(f.deferred)
		return nil
	case f.what != isToWrite:
		return nil // it is stored as required, or skipped
	}
	next := f.next
	if next.attempts = i.attempts + 1; next.attempts >= maxAttempts {
		r.skip(skippedFailed, now.Key, "another client keeps writing it, and does not encrypt it as the rule does")
		return nil
	}
	return r.store(ctx, []*item{next})
}
