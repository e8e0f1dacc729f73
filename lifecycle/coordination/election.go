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

// Election elects one of several processes for a job, such as re-encryption. It is not about the
// Election calls of clients, which package proxy/etcdapi serves.
type Election struct {
	Client *clientv3.Client
	Key    string // prefix of the candidates' keys
	Self   string // how this process is called
	// Waiting is called with the name of the leader while this process waits, and again when the
	// leader changes. May be nil.
	Waiting func(holder string)
	// NoWait makes Run return [ErrOtherLeader] instead of waiting for another leader.
	NoWait bool
}

// Errors of [Election.Run].
var (
	// ErrOtherLeader is returned if another process is the leader.
	ErrOtherLeader = errors.New("another process does it")
	// ErrLeadershipLost is the cause of the end of the job's context when the lease of this process
	// has expired.
	ErrLeadershipLost = errors.New("the lease of the process that does it has ended")
)

const (
	electionTTL   = 15 // seconds after it died a process counts as the one that does the job
	electionCheck = time.Second
)

// Run waits until this process is elected, and calls f. The context of f ends with
// [ErrLeadershipLost] if the leadership is lost. Run returns the error of f, or that of the
// election. The leadership of a process that has crashed ends with its lease, after 15 seconds.
func (e Election) Run(ctx context.Context, f func(context.Context) error) error {
	session, err := concurrency.NewSession(e.Client, concurrency.WithTTL(electionTTL), concurrency.WithContext(ctx))
	if err != nil {
		return fmt.Errorf("elect who does it: %w", err)
	}
	defer func() {
		session.Orphan()
		revoking, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
		defer cancel()
		_, _ = e.Client.Revoke(revoking, session.Lease()) // otherwise it expires
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
	own, reported := fmt.Sprintf("%s/%x", e.Key, session.Lease()), ""
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
		// An election of its own, because the one that campaigns is not safe for concurrent use.
		now, err := concurrency.NewElection(session, e.Key).Leader(ctx)
		if err != nil || len(now.Kvs) == 0 || string(now.Kvs[0].Key) == own {
			continue
		}
		if holder := string(now.Kvs[0].Value); e.NoWait {
			stop(fmt.Errorf("%w: %s", ErrOtherLeader, holder))
		} else if holder != reported && e.Waiting != nil {
			e.Waiting(holder)
			reported = holder
		}
	}
}
