package reencrypt

import (
	"context"
	"errors"
	"strings"
	"sync"
	"time"

	"github.com/cenkalti/backoff/v5"
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
)

// What a run waits for, for Paused.
const (
	waitElection = "the election"
	waitKMS      = "the KMS"
	waitRefused  = "the KMS, which refuses some values"
	waitRead     = "reading from etcd"
	waitWrite    = "writing to etcd"
	waitSlow     = "etcd is slow"
)

// waiting counts the goroutines that wait for one thing.
type waiting struct {
	by  int
	why string
}

// waits are the things that goroutines of a run wait for. They are safe for concurrent use.
type waits struct {
	paused func(what, why string) // may be nil
	lock   sync.Mutex
	active map[string]*waiting // by what is waited for
}

func newWaits(paused func(what, why string)) waits {
	if paused == nil {
		paused = func(string, string) {}
	}
	return waits{paused: paused, active: make(map[string]*waiting)}
}

// pause is the wait of one goroutine for one thing. It begins with the first report.
type pause struct {
	waits *waits
	what  string
	begun bool
}

// report reports why the run waits, if that has changed.
func (p *pause) report(why string) {
	w := p.waits
	w.lock.Lock()
	defer w.lock.Unlock()
	one := w.active[p.what]
	if one == nil {
		one = &waiting{}
		w.active[p.what] = one
	}
	if !p.begun {
		p.begun = true
		one.by++
	}
	if one.why != why {
		w.paused(p.what, why)
	}
	one.why = why
}

// end ends the pause if it has begun. After the last one, it reports that the run continues.
func (p *pause) end() {
	if !p.begun {
		return
	}
	p.begun = false
	w := p.waits
	w.lock.Lock()
	defer w.lock.Unlock()
	if one := w.active[p.what]; one.by > 1 {
		one.by--
	} else {
		delete(w.active, p.what)
		w.paused(p.what, "")
	}
}

const (
	firstPause = 100 * time.Millisecond
	maxPause   = 10 * time.Second
)

// newBackOff returns an exponential backoff.
func newBackOff() *backoff.ExponentialBackOff {
	wait := backoff.NewExponentialBackOff()
	wait.InitialInterval, wait.MaxInterval, wait.Multiplier = firstPause, maxPause, 2
	return wait
}

// retry calls f with exponential backoff until it succeeds or fails permanently, and reports what
// it waits for.
func (r *run) retry(ctx context.Context, what string, f func() error) error {
	wait, paused := newBackOff(), pause{waits: &r.waits, what: what}
	defer paused.end()
	for {
		err := f()
		if ctx.Err() != nil && err != nil {
			return context.Cause(ctx)
		}
		why := temporary(err)
		if why == "" {
			return err
		}
		paused.report(why)
		if errors.Is(err, rpctypes.ErrNoSpace) {
			err = r.awaitSpace(ctx)
		} else {
			err = sleep(ctx, wait.NextBackOff())
		}
		if err != nil {
			return err
		}
	}
}

// spaceCheck is the interval of checks for the alarm.
const spaceCheck = 2 * time.Second

// awaitSpace waits until no member has the NOSPACE alarm. If the alarms cannot be read, the next
// write shows.
func (r *run) awaitSpace(ctx context.Context) error {
	for {
		if err := sleep(ctx, spaceCheck); err != nil {
			return err
		}
		checking, cancel := context.WithTimeout(ctx, spaceCheck)
		alarms, err := r.cfg.Client.AlarmList(checking)
		cancel()
		if err != nil {
			return sleep(ctx, maxPause)
		}
		full := false
		for _, a := range alarms.Alarms {
			full = full || a.Alarm == pb.AlarmType_NOSPACE
		}
		if !full {
			return nil
		}
	}
}

// temporary returns the reason for an error that is temporary, and "" for any other.
func temporary(err error) string {
	if err == nil {
		return ""
	}
	if e, ok := errors.AsType[*keyring.Error](err); ok {
		if e.Kind == keyring.Unavailable {
			return e.Text
		}
		return ""
	}
	switch {
	case errors.Is(err, rpctypes.ErrNoSpace):
		return "it has no space left: compact and defragment it (etcdctl compact, etcdctl defrag) or raise its --quota-backend-bytes, then disarm the alarm (etcdctl alarm disarm)"
	case errors.Is(err, context.DeadlineExceeded):
		return "it does not respond in time"
	case errors.Is(err, rpctypes.ErrTooManyRequests), errors.Is(err, rpctypes.ErrAuthOldRevision), errors.Is(err, rpctypes.ErrInvalidAuthToken):
		return err.Error()
	}
	switch codeOf(err) {
	case codes.Unavailable, codes.DeadlineExceeded:
		return err.Error()
	}
	return ""
}

// tooLarge reports whether a request exceeds a size limit of etcd or gRPC.
func tooLarge(err error) bool {
	return errors.Is(err, rpctypes.ErrRequestTooLarge) || codeOf(err) == codes.ResourceExhausted && strings.Contains(err.Error(), "larger than max")
}

// codeOf returns the gRPC code of an error of etcd's client.
func codeOf(err error) codes.Code {
	if e, ok := errors.AsType[rpctypes.EtcdError](err); ok {
		return e.Code()
	}
	return status.Code(err)
}

// sleep waits for d, or returns the cause of the end of ctx.
func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// retryingKV is a KV that repeats reads until etcd responds.
type retryingKV struct {
	clientv3.KV
	run *run
}

// Get implements [clientv3.KV].
func (p retryingKV) Get(ctx context.Context, key string, opts ...clientv3.OpOption) (response *clientv3.GetResponse, err error) {
	err = p.run.retry(ctx, waitRead, func() (err error) {
		limited, cancel := context.WithTimeout(ctx, txnTimeout)
		defer cancel()
		response, err = p.KV.Get(limited, key, opts...)
		return err
	})
	return response, err
}
