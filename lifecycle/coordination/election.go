package coordination

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// Election is about which of several processes does a job.
type Election struct {
	Client *clientv3.Client
	Key    string // below which the candidates stand
	Self   string // how this process is called
	// Waiting is told who does the job now, when that is not this process, and again when it is somebody else. May be nil.
	Waiting func(holder string)
	// NoWait gives up if somebody else does the job, with [ErrOtherLeader].
	NoWait bool
}

// Errors of [Election.Run].
var (
	// ErrOtherLeader says that another process does the job.
	ErrOtherLeader = errors.New("another process does it")
	// ErrLeadershipLost says that this process no longer does the job, since etcd did not hear of it for too long.
	ErrLeadershipLost = errors.New("the lease of the process that does it has ended")
)

const (
	electionTTL   = 15 // seconds after it died a process counts as the one that does the job
	electionCheck = time.Second
)

// Run calls f once this process is the one that does the job, with a context that ends, with [ErrLeadershipLost], if it no longer is. It returns f's error, or that of
// the election. A process that has died no longer counts after a quarter of a minute.
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
	if err := e.campaign(ctx, session); err != nil {
		return err
	}
	working, stop := context.WithCancelCause(ctx)
	ended := make(chan struct{})
	defer func() { stop(nil); <-ended }()
	go func() {
		defer close(ended)
		select {
		case <-session.Done():
			if ctx.Err() == nil {
				stop(ErrLeadershipLost)
			}
		case <-working.Done():
		}
	}()
	return f(working)
}

// campaign waits until this process is elected.
func (e Election) campaign(ctx context.Context, session *concurrency.Session) error {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	election, elected := concurrency.NewElection(session, e.Key), make(chan error, 1)
	go func() { elected <- election.Campaign(ctx, e.Self) }()
	own, told := fmt.Sprintf("%s/%x", e.Key, session.Lease()), ""
	for wait := time.Duration(0); ; wait = electionCheck {
		select {
		case err := <-elected:
			if cause := context.Cause(ctx); err != nil && cause != nil {
				err = cause
			}
			if errors.Is(err, rpctypes.ErrLeaseNotFound) {
				err = ErrLeadershipLost
			}
			if err != nil {
				return fmt.Errorf("elect who does it: %w", err)
			}
			return nil
		case <-session.Done():
			stop(ErrLeadershipLost) // unless ctx has ended, and the session with it
			<-elected               //nolint:errcheck // it says that it was stopped
			return fmt.Errorf("elect who does it: %w", context.Cause(ctx))
		case <-time.After(wait):
		}
		// A reader of its own: the one under way is not for concurrent use.
		now, err := concurrency.NewElection(session, e.Key).Leader(ctx)
		if err != nil || len(now.Kvs) == 0 || string(now.Kvs[0].Key) == own {
			continue
		}
		if holder := string(now.Kvs[0].Value); e.NoWait {
			stop(fmt.Errorf("%w: %s", ErrOtherLeader, holder))
		} else if holder != told && e.Waiting != nil {
			e.Waiting(holder)
			told = holder
		}
	}
}
