package lifecycle

import (
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// Election is about which of several processes does a job.
type Election struct {
	Client *clientv3.Client
	Key    string // below which the candidates stand
	Self   string // how this process is called
	// Waiting is told, when it begins, who does the job now. May be nil.
	Waiting func(holder string)
	// NoWait gives up if somebody else does the job, with [ErrElsewhere].
	NoWait bool
}

// ErrElsewhere says that another process does the job.
var ErrElsewhere = errors.New("another process does it")

// electionTTL is how many seconds after it died a process counts as the one that does the job.
const electionTTL = 15

// Run calls f once this process is the one that does the job, with a context that ends, with [ErrElsewhere], if it no longer is. It returns f's error, or that of
// the election.
func (e Election) Run(ctx context.Context, f func(context.Context) error) error {
	session, err := concurrency.NewSession(e.Client, concurrency.WithTTL(electionTTL), concurrency.WithContext(ctx))
	if err != nil {
		return fmt.Errorf("elect who does it: %w", err)
	}
	defer func() {
		session.Orphan()
		revoking, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		_, _ = e.Client.Revoke(revoking, session.Lease()) // else it ends by itself
	}()
	election := concurrency.NewElection(session, e.Key)
	if now, err := election.Leader(ctx); err == nil && len(now.Kvs) > 0 {
		if e.NoWait {
			return fmt.Errorf("%w: %s", ErrElsewhere, now.Kvs[0].Value)
		}
		if e.Waiting != nil {
			e.Waiting(string(now.Kvs[0].Value))
		}
	}
	if err := election.Campaign(ctx, e.Self); err != nil {
		return fmt.Errorf("elect who does it: %w", err)
	}
	working, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	ended := make(chan struct{})
	defer func() { stop(nil); <-ended }()
	go func() {
		defer close(ended)
		select {
		case <-session.Done():
			stop(ErrElsewhere)
		case <-working.Done():
		}
	}()
	return f(working)
}
