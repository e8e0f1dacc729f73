package main

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

	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/audit"
)

func newReencrypt() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "reencrypt",
		Short: "bring every value in etcd to what its rule writes now",
		Long: `reencrypt rewrites what is not as its rule writes it now: plaintext, values under an old key or of another provider. With writeWith: plaintext it
decrypts, which is how encryption is switched off. It works on etcd itself, past the proxy, while the cluster runs: a concurrent write always wins, leases stay, and
ending it at any time leaves nothing half done. Run again, it goes on.

Each value that is rewritten is a revision of etcd's history until that is compacted, and an event for whoever watches it; how many is said before the first
one is written. --dry-run stops there.

Of several at a time, one works, and the others wait. Exit code 1 says that something could not be rewritten, and which keys.`,
		Args: cobra.NoArgs,
	}
	path, out := configFlag(cmd), outputFlag(cmd)
	var o reencryptOptions
	cmd.Flags().StringVar(&o.prefix, "prefix", "", "only keys that begin with `PREFIX`")
	cmd.Flags().IntVar(&o.workers, "workers", 2, "transactions at a time")
	cmd.Flags().Float64Var(&o.rate, "rate", 0, "values a second, at most; 0: as many as etcd takes")
	cmd.Flags().IntVar(&o.maxOps, "max-txn-ops", 128, "etcd's flag of this name")
	cmd.Flags().BoolVar(&o.dryRun, "dry-run", false, "say what would be rewritten, and what it costs; write nothing")
	cmd.Flags().BoolVar(&o.noWait, "no-wait", false, "fail if another reencrypt is at work")
	wait := cmd.Flags().Duration("timeout", 30*time.Second, "how long to wait for etcd and for each KMS at the start")
	cmd.RunE = fails(func(cmd *cobra.Command, _ []string) error {
		if o.workers < 1 || o.rate < 0 || o.maxOps < 1 {
			return &failure{code: exitUsage, err: errors.New("--workers and --max-txn-ops are at least 1, --rate at least 0")}
		}
		c, err := loadConfig(cmd, *path)
		if err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		cmd.SetContext(ctx)
		cl, err := openCluster(cmd, c, clusterOptions{wait: *wait})
		if err != nil {
			return err
		}
		defer cl.close()
		report, err := cl.reencrypt(ctx, o, cmd.ErrOrStderr())
		if report != nil {
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
	prefix         string
	workers        int
	rate           float64
	maxOps         int
	dryRun, noWait bool
}

// reencryptReport is what reencrypt has done.
type reencryptReport struct {
	OK      bool `json:"ok"`
	DryRun  bool `json:"dryRun,omitempty"`
	Stopped bool `json:"interrupted,omitempty"`
	lifecycle.Result
	Seconds float64         `json:"seconds"`
	Left    []reencryptLeft `json:"left"` // keys that could not be rewritten, the first maxLeft
}

type reencryptLeft struct {
	Key string `json:"key"`
	Why string `json:"why"`
}

const (
	maxLeft   = 1000
	maxPasses = 5 // a later one finds what proxies with other rules wrote during the one before
)

// reencrypt runs once this process is the one that does. The report is nil if it never was.
func (cl *cluster) reencrypt(ctx context.Context, o reencryptOptions, stderr io.Writer) (*reencryptReport, error) {
	view := newReencryptView(stderr)
	c := lifecycle.ReencryptConfig{
		KV: cl.etcd, Rules: cl.rules, Prefix: o.prefix, Workers: o.workers, Rate: o.rate, MaxOps: o.maxOps, MaxBytes: cl.config.Etcd.MaxRequestBytes, Paused: view.paused,
	}
	plan := c
	plan.DryRun, plan.Progress, plan.Left = true, view.planning, nil
	if o.dryRun {
		plan.Left = view.left
	}
	planned, err := lifecycle.Reencrypt(ctx, plan)
	view.end()
	if err != nil {
		return cl.ended(ctx, planned, view, o, err)
	}
	view.cost(planned, cl.room(ctx))
	if o.dryRun {
		r, err := cl.ended(ctx, planned, view, o, nil)
		r.OK = r.Rewritten == 0 && r.Result.Left() == 0
		return r, err
	}
	var report *reencryptReport
	host, _ := os.Hostname()
	election := lifecycle.Election{
		Client: cl.etcd, Key: cl.config.Coordination.Prefix + "reencrypt", Self: fmt.Sprintf("%s, process %d", host, os.Getpid()), NoWait: o.noWait,
		Waiting: func(holder string) { view.say("waiting: another reencrypt is at work (%s)", holder) },
	}
	record := func(outcome, reason string, keys int64) error {
		return recordCommand(cl.config, stderr, audit.Record{Command: "reencrypt", Key: o.prefix, Outcome: outcome, Reason: reason, Keys: keys})
	}
	if err := record("begun", "", planned.Rewritten); err != nil {
		return nil, err
	}
	err = election.Run(ctx, func(ctx context.Context) error {
		var total lifecycle.Result
		for range maxPasses {
			view.begin(planned.Keys)
			pass := c
			pass.Progress, pass.Left = view.progress, view.left
			done, err := lifecycle.Reencrypt(ctx, pass)
			view.end()
			total = total.And(done)
			if err != nil || done.Rewritten == 0 && done.Raced == 0 {
				report, err = cl.ended(ctx, total, view, o, err)
				return err
			}
		}
		report, err = cl.ended(ctx, total, view, o, nil)
		return err
	})
	outcome, reason := "ok", ""
	switch {
	case err != nil:
		outcome, reason = "failed", err.Error()
	case report.Stopped:
		outcome = "interrupted"
	case !report.OK:
		outcome, reason = "failed", fmt.Sprintf("%d left", report.Result.Left())
	}
	keys := int64(0)
	if report != nil {
		keys = report.Rewritten
	}
	return report, errors.Join(err, record(outcome, reason, keys))
}

// ended makes the report. An interruption is no error.
func (cl *cluster) ended(ctx context.Context, done lifecycle.Result, view *reencryptView, o reencryptOptions, err error) (*reencryptReport, error) {
	r := &reencryptReport{DryRun: o.dryRun, Result: done, Seconds: done.Duration.Seconds(), Left: view.leftKeys()}
	r.OK = err == nil && done.Left() == 0
	if err != nil && errors.Is(ctx.Err(), context.Canceled) && errors.Is(err, context.Canceled) {
		r.Stopped = true
		return r, nil
	}
	return r, err
}

// room returns the members' database sizes and quotas, as far as they say.
func (cl *cluster) room(ctx context.Context) []*clientv3.StatusResponse {
	var all []*clientv3.StatusResponse
	for _, endpoint := range cl.etcd.Endpoints() {
		limited, cancel := context.WithTimeout(ctx, 5*time.Second)
		if s, err := cl.etcd.Status(limited, endpoint); err == nil {
			all = append(all, s)
		}
		cancel()
	}
	return all
}

// text prints the report for people.
func (r *reencryptReport) text(w io.Writer) {
	for _, l := range r.Left {
		fmt.Fprintf(w, "left\t%s: %s\n", l.Key, l.Why)
	}
	if n := r.Result.Left() - int64(len(r.Left)); n > 0 {
		fmt.Fprintf(w, "left\tand %d more\n", n)
	}
	verb := "rewritten"
	if r.DryRun {
		verb = "to rewrite"
	}
	fmt.Fprintf(w, "%d keys: %d %s in %d transactions, %d current, %d written by others meanwhile, %d left, %.1f s\n",
		r.Keys, r.Rewritten, verb, r.Transactions, r.Current, r.Raced, r.Result.Left(), r.Seconds)
	switch {
	case r.Stopped:
		fmt.Fprintln(w, "interrupted: nothing is half done; run it again to go on")
	case r.Rewritten > 0 && !r.DryRun:
		fmt.Fprintln(w, "the old values are still in etcd's history and files: see purge")
	}
}
