package stored

import (
	"context"
	"errors"
	"io"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/etcdclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/reencrypt"
)

// NewReencrypt returns the command reencrypt.
func NewReencrypt() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "reencrypt",
		Short: "rewrite every value in etcd that is not encrypted as its rule says",
		Long: `reencrypt rewrites every value that is not encrypted as its rule says: plaintext, and values under
an old key or of another provider. With writeWith: plaintext it decrypts values, which is how
encryption is turned off. It connects to etcd directly, and is safe to run on a
live cluster: concurrent writes always win, leases are kept, and an interrupted run leaves no value
half done. Run it again to continue.

Under a rule with allowPlaintextReads: false, plaintext is reported and not rewritten: it was
written to etcd directly, reads of it are refused, and encrypting it would make it a genuine value.
--encrypt-plaintext encrypts it nevertheless; check the values first (status --list names them).
Values of providers that a rule does not read are never rewritten, since they cannot be decrypted.

If the key of the values is gone, --identity decrypts them by the recovery copies of a provider of
kind age. These copies are not authenticated: anyone who knows the recipients can make one. If other
software than the proxies could write to etcd, check the values first.

Each rewritten value is a revision in etcd's history until etcd is compacted, and an event for its
watchers. The number is printed before the first write. --dry-run stops there.

If several runs are started, one works and the others wait. A proxy that announced other rules than
those of this configuration stops the run, since it might not be able to read the values.

The report lists the values that could not be rewritten. An interrupted run exits with 3.`,
		Args: command.NoArgs,
	}
	path, out := command.ConfigFlag(cmd), command.OutputFlag(cmd)
	var o reencryptOptions
	o.flags(cmd)
	wait, identities := timeoutFlag(cmd), identityFlag(cmd)
	cmd.RunE = command.Run(func(cmd *cobra.Command, _ []string) error {
		o.identities = *identities
		if err := o.check(); err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		context.AfterFunc(ctx, stop) // a second signal ends the process at once
		cmd.SetContext(ctx)
		cl, err := loadCluster(cmd, *path, clusterOptions{identities: *identities, wait: *wait})
		if err != nil {
			return err
		}
		defer cl.close()
		if !cl.rules.Under(o.prefix) {
			return command.Usage("rules have the prefixes of etcd's keys: see rules in "+*path, "--prefix %q: no rule has keys below it", o.prefix)
		}
		job := &reencryption{cluster: cl, options: o, view: newReencryptView(cmd.ErrOrStderr()), stderr: cmd.ErrOrStderr()}
		if o.watch {
			return job.follow(ctx)
		}
		report, err := job.once(ctx)
		if report != nil && report.Pass > 0 {
			if werr := out.Write(cmd.OutOrStdout(), report, report.text); err == nil {
				err = werr
			}
		}
		if err == nil && !report.OK {
			err = command.ErrFindings
		}
		return err
	})
	return cmd
}

type reencryptOptions struct {
	prefix                               string
	workers, txnKeys, passes             int
	rate                                 float64
	dryRun, noWait, watch, ignoreProxies bool
	encryptPlaintext                     bool
	interval                             time.Duration
	identities                           []string
}

func (o *reencryptOptions) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.prefix, "prefix", "", "only keys that begin with `PREFIX`")
	f.IntVar(&o.workers, "workers", 4, "number of concurrent transactions")
	f.Float64Var(&o.rate, "rate", 0, "maximum of values per second; 0: no limit")
	f.IntVar(&o.txnKeys, "txn-keys", 1, "maximum of values in one transaction. More than 1 is faster, and not for the etcd of kube-apiserver: the watches of its clients can miss such changes")
	f.IntVar(&o.passes, "passes", 5, "maximum of passes over all keys until nothing is left to do")
	f.BoolVar(&o.dryRun, "dry-run", false, "print what would be rewritten, and what it costs; write nothing")
	f.BoolVar(&o.encryptPlaintext, "encrypt-plaintext", false, "encrypt plaintext also under rules with allowPlaintextReads: false, which makes values that were written to etcd directly genuine")
	f.BoolVar(&o.noWait, "no-wait", false, "fail if another reencrypt is running")
	f.BoolVar(&o.watch, "watch", false, "keep running, and re-encrypt after each rotation, until a signal")
	f.DurationVar(&o.interval, "interval", time.Hour, "with --watch, the time between two runs without another reason")
	f.BoolVar(&o.ignoreProxies, "ignore-proxies", false, "do not check whether the proxies have the rules of this configuration")
}

func (o *reencryptOptions) check() error {
	var text string
	switch {
	case o.workers < 1 || o.txnKeys < 1 || o.passes < 1:
		text = "--workers, --txn-keys and --passes must be at least 1"
	case o.rate < 0:
		text = "--rate must be at least 0"
	case o.watch && (o.dryRun || o.noWait):
		text = "--watch cannot be used with --dry-run or --no-wait"
	case o.watch && o.encryptPlaintext:
		text = "--watch cannot be used with --encrypt-plaintext: it would encrypt everything that is written to etcd directly"
	case o.watch && len(o.identities) > 0:
		text = "--watch cannot be used with --identity: private keys of a recovery do not belong into a process that keeps running"
	case o.interval < time.Second:
		text = "--interval must be at least 1s"
	default:
		return nil
	}
	return command.Usage("", "%s", text)
}

// reencryption is one run of the command.
type reencryption struct {
	*cluster
	options reencryptOptions
	view    *reencryptView
	stderr  io.Writer
	planned int64 // values to rewrite; 0 if it was not counted
	begun   bool  // the audit log has the begin of a run
}

// runConfig returns the configuration of a run.
func (j *reencryption) runConfig() reencrypt.Config {
	o := j.options
	c := reencrypt.Config{
		Client: j.etcd, Rules: func() *inventory.Rules { return j.rules }, Prefix: o.prefix, Workers: o.workers, Rate: o.rate, TxnKeys: o.txnKeys,
		MaxBytes: j.config.Etcd.MaxRequestBytes, Passes: o.passes, EncryptPlaintext: o.encryptPlaintext, Paused: j.view.paused, Progress: j.view.progress,
		Election: coordination.Election{
			Client: j.etcd, Key: j.config.Coordination.Prefix + "reencrypt", Self: etcdclient.Self(), NoWait: o.noWait,
			Waiting: func(holder string) { j.view.printLine("waiting: another reencrypt is at work (%s)", holder) },
		},
		Begin: func() error {
			j.begun = true
			reason := ""
			if o.encryptPlaintext {
				reason = "with --encrypt-plaintext"
			}
			return j.record("begun", command.WithIdentity(reason, o.identities), j.planned)
		},
	}
	if j.config.Coordination.Enabled && !o.ignoreProxies {
		c.Check = j.fleet().SameRules
	}
	return c
}

func (j *reencryption) record(outcome, reason string, keys int64) error {
	return command.Record(j.config, j.stderr, auditlog.Record{Command: "reencrypt", Key: j.options.prefix, Outcome: outcome, Reason: reason, Keys: keys})
}

// once runs once. The report is nil without a run, and has no pass if another process works.
func (j *reencryption) once(ctx context.Context) (*reencryptReport, error) {
	c := j.runConfig()
	plan := c
	plan.DryRun = true
	planned, err := reencrypt.Run(ctx, plan)
	j.view.end()
	if err != nil {
		_, err := j.report(ctx, planned, err)
		return nil, err
	}
	j.view.showCost(planned, j.memberStatuses(ctx))
	if j.options.dryRun {
		return j.report(ctx, planned, nil)
	}
	j.planned = planned.Rewritten
	j.view.begin(planned)
	done, err := reencrypt.Run(ctx, c)
	j.view.end()
	report, err := j.report(ctx, done, err)
	return report, errors.Join(err, j.ended(report, err))
}

// ended records the end of a run, if its begin was recorded.
func (j *reencryption) ended(report *reencryptReport, err error) error {
	if !j.begun {
		return nil
	}
	j.begun = false
	outcome, reason := "ok", ""
	switch {
	case report.Interrupted:
		outcome = "interrupted"
	case err != nil:
		outcome, reason = "failed", err.Error()
	case !report.OK:
		outcome, reason = "failed", printable.Count(report.Unfinished(), "value", "values")+" could not be rewritten"
	}
	return j.record(outcome, reason, report.Rewritten)
}

// report returns the report of a run that ended with err, and the error of the command.
func (j *reencryption) report(ctx context.Context, done reencrypt.Result, err error) (*reencryptReport, error) {
	r := &reencryptReport{OK: err == nil && done.Unfinished() == 0, DryRun: j.options.dryRun, Result: done, Seconds: done.Duration.Seconds(), partial: err != nil}
	switch {
	case err == nil:
		return r, nil
	case ctx.Err() != nil:
		r.Interrupted = true
		return r, problem.New("no value is half done; run it again to continue", "interrupted")
	case errors.Is(err, coordination.ErrOtherLeader):
		return r, problem.WithHint(err, "run it without --no-wait to wait")
	}
	return r, explainOtherRules(err)
}

// memberStatuses returns the database sizes and quotas of the members that respond.
func (j *reencryption) memberStatuses(ctx context.Context) []*clientv3.StatusResponse {
	var all []*clientv3.StatusResponse
	for _, endpoint := range j.etcd.Endpoints() {
		limited, cancel := context.WithTimeout(ctx, 5*time.Second)
		if s, err := j.etcd.Status(limited, endpoint); err == nil {
			all = append(all, s)
		}
		cancel()
	}
	return all
}

// follow re-encrypts after each rotation until ctx ends.
func (j *reencryption) follow(ctx context.Context) error {
	j.view.begin(reencrypt.Result{}) // without a plan
	f := reencrypt.Loop{Config: j.runConfig(), Interval: j.options.interval, Keys: j.keys.Version, Ended: func(done reencrypt.Result, err error) {
		j.view.end()
		report, err := j.report(ctx, done, err)
		err = errors.Join(err, j.ended(report, err))
		switch {
		case err != nil && ctx.Err() == nil:
			j.view.printLine("failed, will be retried: %v", err)
		case report.Rewritten > 0 || !report.OK:
			report.text(j.view)
		}
	}}
	f.Run(ctx)
	return nil
}
