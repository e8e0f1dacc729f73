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

// Config configures [Run]. The zero value of a field is its documented default.
type Config struct {
	Client *clientv3.Client
	// Rules returns the current rules, which may change during a run.
	Rules  func() *inventory.Rules
	Prefix string // only keys that begin with it
	// Workers is the number of concurrent transactions; 0 is 4.
	Workers int
	// Rate is the maximum number of values rewritten per second; 0 is no limit.
	Rate float64
	// TxnKeys is the maximum number of values in one transaction; 0 is 1. The values of one
	// transaction change at one revision. A client of kube-apiserver whose watch breaks between two
	// of them continues after that revision and misses the second one, so more than 1 is for other
	// clients of etcd.
	TxnKeys int
	// MaxBytes is etcd's --max-request-bytes; 0 is its default. Lower limits of etcd are detected.
	MaxBytes int
	// Passes is the maximum number of passes over all keys; 0 is 5. A later pass finds what other
	// clients wrote during the one before. There is none if nothing was left to do.
	Passes int
	// DryRun counts in one pass what would be written, and writes nothing.
	DryRun bool
	// EncryptPlaintext encrypts plaintext under rules that are [inventory.Rule.Strict] as well.
	// Without it, such values are skipped: reads of them are refused, and encryption would turn
	// values that were written to etcd directly into valid ones.
	EncryptPlaintext bool

	// Election elects one of several processes. There is none if its Key is empty, or in a dry run.
	Election coordination.Election
	// Check is called before each pass; its error ends the run. May be nil.
	Check func(context.Context) error
	// Begin is called once, before the first transaction; its error ends the run. May be nil.
	Begin func() error

	// Progress is called after each transaction and at intervals, on several goroutines. May be
	// nil.
	Progress func(Progress)
	// Paused is called, on several goroutines, with what the run waits for and why, and with an
	// empty reason when it continues. May be nil.
	Paused func(what, why string)
}

// Progress counts what a run has done so far.
type Progress struct {
	Pass      int   `json:"passes"`    // the first is 1
	Keys      int64 `json:"keys"`      // examined in this pass
	Current   int64 `json:"current"`   // stored as their rules require, in the first pass
	Rewritten int64 `json:"rewritten"` // with DryRun: would be
	// of these, under rules that write plaintext
	Decrypted int64 `json:"decrypted"`
	// of their keys and new values: the minimum growth of the database
	Bytes        int64 `json:"bytes"`
	Transactions int64 `json:"transactions"` // that is, revisions of etcd
	// times that another client wrote or deleted a value meanwhile
	Raced int64 `json:"raced"`
	// skipped in this pass: encrypted by a provider that the rule does not read
	Foreign int64 `json:"foreign"`
	// skipped in this pass: plaintext under a strict rule
	Plaintext     int64 `json:"plaintext"`
	Undecryptable int64 `json:"undecryptable"` // skipped in this pass: they cannot be decrypted
	// skipped in this pass: their KMS is healthy, and does not unwrap their DEK seeds
	Refused int64 `json:"refused"`
	// skipped in this pass: they cannot be encrypted, or etcd refuses them
	Failed int64 `json:"failed"`
}

// Unfinished returns the number of values that are not stored as their rules require.
func (p *Progress) Unfinished() int64 {
	return p.Foreign + p.Plaintext + p.Undecryptable + p.Refused + p.Failed
}

// Skipped is a key whose value could not be rewritten.
type Skipped struct {
	Key      string `json:"key"`
	KeyBytes []byte `json:"keyBytes,omitempty"` // Key where that is not valid UTF-8
	Why      string `json:"why"`
}

// MaxSkipped is the maximum length of Result.Skipped.
const MaxSkipped = 100

// Result is the outcome of a run.
type Result struct {
	Progress
	Skipped   []Skipped      `json:"left"`      // of the last pass, the first MaxSkipped
	Revisions inventory.Span `json:"revisions"` // from the first read to the last read or written
	Duration  time.Duration  `json:"-"`
}

const (
	defaultWorkers  = 4
	defaultPasses   = 5
	defaultMaxBytes = 1536 << 10
)

// Run rewrites every value under rules that is not stored as its rule requires. A transaction
// applies only if none of its keys was written since it was read. Therefore a concurrent write
// always wins, and a process that ends at any time leaves each value either unchanged or rewritten.
// Leases are kept. Every new value is decrypted and compared before it is written. Run makes passes
// over all keys until nothing is left to do. It returns its result also with an error. After ctx
// ends it finishes the transactions in flight, and returns the error of ctx.
//
// If the KMS does not unwrap a DEK seed, and does not say whether that is permanent, the value is
// deferred until all others are done, and tried again. It is skipped if the KMS is healthy
// otherwise. Run waits, and reports that through Paused, while etcd or a KMS is unavailable, while
// etcd has no space, and while another process re-encrypts. It slows down while etcd is slow.
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

// elected makes the passes once this process is elected.
func (r *run) elected(ctx context.Context) error {
	if r.cfg.DryRun || r.cfg.Election.Key == "" {
		return r.passes(ctx)
	}
	wait, paused := newBackOff(), pause{waits: &r.waits, what: waitElection}
	for {
		err := r.cfg.Election.Run(ctx, r.passes)
		why := temporary(err)
		if ctx.Err() != nil || why == "" && !errors.Is(err, coordination.ErrLeadershipLost) {
			return err
		}
		if why == "" {
			why = err.Error()
		}
		paused.report(why)
		err = sleep(ctx, wait.NextBackOff())
		paused.end()
		if err != nil {
			return err
		}
	}
}

// passes makes passes until one finds nothing to do.
func (r *run) passes(ctx context.Context) error {
	for range r.cfg.Passes {
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
