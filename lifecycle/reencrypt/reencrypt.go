// Package reencrypt rewrites every value in etcd that is not stored as its rule requires: [Run]
// once, [Loop] after each key rotation and at intervals. It connects to etcd directly and is safe
// on a live cluster: each write is a transaction that compares the revision of the key, so a
// concurrent write always wins.
package reencrypt

import (
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// Config configures Reencrypt. The zero value of a field is its documented default.
type Config struct {
	Client *clientv3.Client
	// Rules are those of the moment: they may change while a run is under way.
	Rules  func() *inventory.Rules
	Prefix string // only keys that begin with it
	// Workers is how many transactions are under way at a time; 0 is 4.
	Workers int
	// Rate is how many values are rewritten a second at most; 0 is as many as etcd takes.
	Rate float64
	// TxnKeys is how many values one transaction rewrites at most; 0 is 1. Values of one
	// transaction change at one revision. A client of kube-apiserver whose watch breaks between two
	// of them goes on after that revision, and never learns of the second: more than 1 is for other
	// clients of etcd.
	TxnKeys int
	// MaxBytes is etcd's --max-request-bytes; 0 is its default. Where etcd's limits are lower, that
	// is found out.
	MaxBytes int
	// Passes is how often all keys are looked at, at most, until there is nothing left to do; 0 is
	// 5. A later pass finds what others wrote meanwhile.
	Passes int
	// DryRun counts in one pass what would be written, and writes nothing.
	DryRun bool
	// EncryptPlaintext encrypts plaintext under rules that are [inventory.Rule.Strict] as well.
	// Without it such values are left: reads of them are refused, and encrypting them would turn
	// whatever was written past the proxies into genuine values.
	EncryptPlaintext bool

	// coordination.Election is about who works, of several. None if its Key is empty, or in a dry
	// run.
	Election coordination.Election
	// Check is called before each pass; its error ends the run. May be nil.
	Check func(context.Context) error
	// Begin is called once, before the first transaction; its error ends the run. May be nil.
	Begin func() error

	// Progress is told after each transaction and now and then, on several goroutines. May be nil.
	Progress func(Progress)
	// Paused is told what the run waits for, and why, and "" when it goes on, on several
	// goroutines. May be nil.
	Paused func(what, why string)
}

// Progress is what a run has done so far.
type Progress struct {
	Pass          int   `json:"passes"`        // the first is 1
	Keys          int64 `json:"keys"`          // looked at in this pass
	Current       int64 `json:"current"`       // were found as their rules write them, in the first pass
	Rewritten     int64 `json:"rewritten"`     // with DryRun: would be
	Bytes         int64 `json:"bytes"`         // of their keys and new values: what the database grows by at least
	Transactions  int64 `json:"transactions"`  // that is, revisions of etcd
	Raced         int64 `json:"raced"`         // times that a value was written or deleted by somebody else meanwhile, and was looked at again
	Foreign       int64 `json:"foreign"`       // left in this pass: sealed by a provider that the rule does not read
	Plaintext     int64 `json:"plaintext"`     // left in this pass: plaintext under a rule that is strict
	Undecryptable int64 `json:"undecryptable"` // left in this pass: they do not open
	Refused       int64 `json:"refused"`       // left in this pass: their KMS is well, and does not unwrap their DEK seeds
	Failed        int64 `json:"failed"`        // left in this pass: they cannot be sealed, or etcd does not take them
}

// Unfinished is how many values are not as their rules write them.
func (p *Progress) Unfinished() int64 {
	return p.Foreign + p.Plaintext + p.Undecryptable + p.Refused + p.Failed
}

// Skipped is a key whose value could not be rewritten.
type Skipped struct {
	Key      string `json:"key"`
	KeyBytes []byte `json:"keyBytes,omitempty"` // Key where that is not valid UTF-8
	Why      string `json:"why"`
}

// MaxSkipped is how many of the keys that are left a Result names.
const MaxSkipped = 100

// Result is what a run has done.
type Result struct {
	Progress
	Skipped   []Skipped      `json:"left"`      // of the last pass, the first MaxSkipped
	Revisions inventory.Span `json:"revisions"` // from the first that was read to the last that was written or read
	Duration  time.Duration  `json:"-"`
}

const (
	defaultWorkers  = 4
	defaultPasses   = 5
	defaultMaxBytes = 1536 << 10
)

// Reencrypt brings every value under rules to what its rule writes now. Each transaction holds only
// if none of its keys was written since it was read, so that a concurrent write always wins, and
// ending the process at any time leaves each value as it was or as it is to be. Leases stay. What
// is written was opened first, and compared. It passes over all keys until there is nothing left to
// do, and returns what it did so far even with an error, which is that of ctx if it was
// interrupted: transactions under way are finished then.
//
// A value whose DEK seed its KMS does not unwrap, for no reason that says whether it lasts, is put
// aside until the others are done, tried again, and left if its KMS is well otherwise. It waits,
// and says so, while etcd or a KMS is not there, while etcd has no space, and while another process
// does the same, and goes slower while etcd is slow.
func Run(ctx context.Context, c Config) (Result, error) {
	r := newRun(c)
	begun := time.Now()
	err := r.elected(ctx)
	result := r.result()
	result.Duration = time.Since(begun)
	if err != nil {
		return result, fmt.Errorf("re-encrypt: %w", err)
	}
	return result, nil
}

// elected makes the passes once this process is the one to do so.
func (r *run) elected(ctx context.Context) error {
	if r.cfg.DryRun || r.cfg.Election.Key == "" {
		return r.passes(ctx)
	}
	wait := newBackOff()
	for {
		err := r.cfg.Election.Run(ctx, r.passes)
		why := passing(err)
		if ctx.Err() != nil || why == "" && !errors.Is(err, coordination.ErrLeadershipLost) {
			return err
		}
		if why == "" {
			why = err.Error()
		}
		r.pause(waitElection, why)
		err = rest(ctx, wait.NextBackOff())
		r.resume(waitElection)
		if err != nil {
			return err
		}
	}
}

// passes looks at all keys until there is nothing left to do.
func (r *run) passes(ctx context.Context) error {
	for n := 0; n < r.cfg.Passes; n++ {
		if r.cfg.Check != nil {
			if err := r.cfg.Check(ctx); err != nil {
				return err
			}
		}
		again, err := r.pass(ctx)
		if err != nil || !again || r.cfg.DryRun {
			return err
		}
	}
	return nil
}
