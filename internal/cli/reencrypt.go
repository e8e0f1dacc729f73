package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/reencrypt"
)

func newReencrypt() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "reencrypt",
		Short: "bring every value in etcd to what its rule writes now",
		Long: `reencrypt rewrites what is not as its rule writes it now: plaintext, values under an old key or of another provider. With writeWith: plaintext it
decrypts, which is how encryption is switched off. It works on etcd itself, past the proxy, while the cluster runs: a concurrent write always wins, leases stay, and
ending it at any time leaves nothing half done. Run again, it goes on.

Under a rule with allowPlaintextReads: false, plaintext is left and named: reads of it are refused, since whoever wrote it went past the proxies, and encrypting it
would make it a genuine value. --encrypt-plaintext encrypts it all the same. Look at the values first (status --list names them). Values of providers that a rule does not
read are always left: they cannot be decrypted.

Each value that is rewritten is a revision of etcd's history until that is compacted, and an event for whoever watches it; how many is said before the first
one is written. --dry-run stops there.

Of several at a time, one works, and the others wait. Proxies that have announced other rules than this configuration's stop it: they might not be able to read what
it writes.

Exit code 0 says that every value is as its rule writes it, 1 that something could not be rewritten, and which keys, 3 that it was interrupted or could not work.`,
		Args: cobra.NoArgs,
	}
	path, out := configFlag(cmd), outputFlag(cmd)
	var o reencryptOptions
	o.flags(cmd)
	wait := cmd.Flags().Duration("timeout", 30*time.Second, "how long to wait for etcd and for each KMS at the start")
	cmd.RunE = fails(func(cmd *cobra.Command, _ []string) error {
		if err := o.check(); err != nil {
			return err
		}
		c, err := loadConfig(cmd, *path)
		if err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		context.AfterFunc(ctx, stop) // a second signal ends the process at once
		cmd.SetContext(ctx)
		cl, err := openCluster(cmd, c, clusterOptions{wait: *wait})
		if err != nil {
			return err
		}
		defer cl.close()
		if !cl.rules.Under(o.prefix) {
			return &failure{code: exitUsage, err: fmt.Errorf("--prefix %q: no rule has keys below it", o.prefix), hint: "rules have the prefixes of etcd's keys: see rules in " + *path}
		}
		job := &reencryption{cluster: cl, options: o, view: newReencryptView(cmd.ErrOrStderr()), stderr: cmd.ErrOrStderr()}
		if o.watch {
			return job.follow(ctx)
		}
		report, err := job.once(ctx)
		if report != nil && report.Pass > 0 {
			if werr := out.write(cmd.OutOrStdout(), report, report.text); err == nil {
				err = werr
			}
		}
		if err == nil && !report.OK {
			err = &failure{code: exitFindings}
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
}

func (o *reencryptOptions) flags(cmd *cobra.Command) {
	f := cmd.Flags()
	f.StringVar(&o.prefix, "prefix", "", "only keys that begin with `PREFIX`")
	f.IntVar(&o.workers, "workers", 4, "transactions at a time")
	f.Float64Var(&o.rate, "rate", 0, "values a second, at most; 0: as many as etcd takes")
	f.IntVar(&o.txnKeys, "txn-keys", 1, "values in one transaction, at most. More than 1 is quicker, and not for kube-apiserver's etcd: its clients' watches can miss such changes")
	f.IntVar(&o.passes, "passes", 5, "times to look at all keys, at most, until nothing is left to do")
	f.BoolVar(&o.dryRun, "dry-run", false, "say what would be rewritten, and what it costs; write nothing")
	f.BoolVar(&o.encryptPlaintext, "encrypt-plaintext", false, "encrypt plaintext under rules with allowPlaintextReads: false as well, which makes whatever was written there past the proxies a genuine value")
	f.BoolVar(&o.noWait, "no-wait", false, "fail if another reencrypt is at work")
	f.BoolVar(&o.watch, "watch", false, "go on, and re-encrypt after each rotation, until a signal")
	f.DurationVar(&o.interval, "interval", time.Hour, "with --watch, the time between two runs for which there is no other reason")
	f.BoolVar(&o.ignoreProxies, "ignore-proxies", false, "do not look whether the proxies have the rules of this configuration")
}

func (o *reencryptOptions) check() error {
	var text string
	switch {
	case o.workers < 1 || o.txnKeys < 1 || o.passes < 1:
		text = "--workers, --txn-keys and --passes are at least 1"
	case o.rate < 0:
		text = "--rate is at least 0"
	case o.watch && (o.dryRun || o.noWait):
		text = "--watch goes with neither --dry-run nor --no-wait"
	case o.watch && o.encryptPlaintext:
		text = "--watch does not go with --encrypt-plaintext: it would encrypt whatever anyone writes past the proxies, again and again"
	case o.interval < time.Second:
		text = "--interval is at least 1s"
	default:
		return nil
	}
	return &failure{code: exitUsage, err: errors.New(text)}
}

// reencryption is one call of the command.
type reencryption struct {
	*cluster
	options reencryptOptions
	view    *reencryptView
	stderr  io.Writer
	planned int64 // values to rewrite; 0 if it was not counted
	begun   bool  // and in the audit log
}

// engine makes the configuration of a run.
func (j *reencryption) engine() reencrypt.Config {
	o := j.options
	c := reencrypt.Config{
		Client: j.etcd, Rules: func() *inventory.Rules { return j.rules }, Prefix: o.prefix, Workers: o.workers, Rate: o.rate, TxnKeys: o.txnKeys,
		MaxBytes: j.config.Etcd.MaxRequestBytes, Passes: o.passes, EncryptPlaintext: o.encryptPlaintext, Paused: j.view.paused, Progress: j.view.progress,
		Election: coordination.Election{
			Client: j.etcd, Key: j.config.Coordination.Prefix + "reencrypt", Self: thisProcess(), NoWait: o.noWait,
			Waiting: func(holder string) { j.view.say("waiting: another reencrypt is at work (%s)", holder) },
		},
		Begin: func() error {
			j.begun = true
			reason := ""
			if o.encryptPlaintext {
				reason = "with --encrypt-plaintext"
			}
			return j.record("begun", reason, j.planned)
		},
	}
	if j.config.Coordination.Enabled && !o.ignoreProxies {
		c.Check = j.fleet().SameRules
	}
	return c
}

func (j *reencryption) record(outcome, reason string, keys int64) error {
	return recordCommand(j.config, j.stderr, auditlog.Record{Command: "reencrypt", Key: j.options.prefix, Outcome: outcome, Reason: reason, Keys: keys})
}

// once makes one run. The report is nil if there was none, and of no pass if another process works.
func (j *reencryption) once(ctx context.Context) (*reencryptReport, error) {
	c := j.engine()
	plan := c
	plan.DryRun = true
	planned, err := reencrypt.Run(ctx, plan)
	j.view.end()
	if err != nil {
		_, err := j.report(ctx, planned, err)
		return nil, err
	}
	j.view.cost(planned, j.room(ctx))
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

// ended records the end of a run whose begin was recorded.
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
		outcome, reason = "failed", fmt.Sprintf("%d values could not be rewritten", report.Unfinished())
	}
	return j.record(outcome, reason, report.Rewritten)
}

// thisProcess is how this process is called where several elect one of them.
func thisProcess() string {
	host, err := os.Hostname()
	if err != nil {
		host = "unknown host"
	}
	return fmt.Sprintf("%s, process %d", host, os.Getpid())
}

// report makes the report of a run that ended with err, and the error of the command.
func (j *reencryption) report(ctx context.Context, done reencrypt.Result, err error) (*reencryptReport, error) {
	r := &reencryptReport{OK: err == nil && done.Unfinished() == 0, DryRun: j.options.dryRun, Result: done, Seconds: done.Duration.Seconds()}
	switch {
	case err == nil:
		return r, nil
	case ctx.Err() != nil:
		r.Interrupted = true
		return r, &failure{code: exitFailure, err: errors.New("interrupted"), hint: "nothing is half done; run it again to go on"}
	case errors.Is(err, coordination.ErrOtherLeader):
		return r, &failure{code: exitFailure, err: err, hint: "without --no-wait it waits"}
	case errors.Is(err, coordination.ErrOtherRules):
		return r, &failure{code: exitFailure, err: err, hint: "give all proxies this configuration first (see status), or use --ignore-proxies"}
	}
	return r, err
}

// room returns the members' database sizes and quotas, as far as they say.
func (j *reencryption) room(ctx context.Context) []*clientv3.StatusResponse {
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
	j.view.begin(reencrypt.Result{}) // without a plan: nobody waits for its end
	f := reencrypt.Loop{Config: j.engine(), Interval: j.options.interval, Keys: j.app.sealsWith, Ended: func(done reencrypt.Result, err error) {
		j.view.end()
		report, err := j.report(ctx, done, err)
		err = errors.Join(err, j.ended(report, err))
		switch {
		case err != nil && ctx.Err() == nil:
			j.view.say("failed, and tried again later: %v", err)
		case report.Rewritten > 0 || !report.OK:
			report.text(j.view)
		}
	}}
	f.Run(ctx)
	return nil
}
