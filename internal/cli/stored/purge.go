package stored

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/purge"
)

// NewPurge returns the command purge.
func NewPurge() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "purge",
		Short: "remove old plaintext from etcd's history and database files",
		Long: `purge removes the old plaintext that remains after reencrypt, in etcd's history and in the freed
pages of its database files. It refuses to run while status finds anything: a value that is not
current, a KMS that does not respond, or a proxy with other rules, which may be writing plaintext.
It finds the last plaintext under the rules in the history, compacts etcd after it, and waits until
each member has finished the compaction. Then it defragments one member after the other, the leader
last, each only while all others are healthy. A member does not respond while it is defragmented.

The report names what purge cannot reach: write-ahead logs and snapshot files, which etcd replaces
over time, old backups, copies of disks, and members that do not finish the compaction, which are
not defragmented.`,
		Args: command.NoArgs,
	}
	path, out := command.ConfigFlag(cmd), command.OutputFlag(cmd)
	dryRun := cmd.Flags().Bool("dry-run", false, "print what would be done, and change nothing")
	yes := cmd.Flags().Bool("yes", false, "do not ask for confirmation")
	ignoreProxies := cmd.Flags().Bool("ignore-proxies", false, "do not check whether the proxies have the rules of this configuration")
	wait := timeoutFlag(cmd)
	settle := cmd.Flags().Duration("compact-timeout", 10*time.Minute, "how long to wait for each member to finish the compaction")
	cmd.RunE = command.RunUntilSignal(func(cmd *cobra.Command, _ []string) error {
		cl, err := loadCluster(cmd, *path, clusterOptions{inspectOnly: true, wait: *wait})
		if err != nil {
			return err
		}
		defer cl.close()
		report, err := cl.purge(cmd, purgeOptions{*dryRun, *yes, *ignoreProxies, *settle})
		if report != nil {
			if werr := out.Write(cmd.OutOrStdout(), report, report.text); err == nil {
				err = werr
			}
		}
		if err == nil && len(report.Left) > 0 {
			err = command.ErrFindings
		}
		return err
	})
	return cmd
}

type purgeOptions struct {
	dryRun, yes, ignoreProxies bool
	settle                     time.Duration // how long to wait for the compaction of each member
}

// purgeReport is the result of purge.
type purgeReport struct {
	DryRun  bool          `json:"dryRun,omitempty"`
	History purge.History `json:"history"`
	// Undecrypted is how many of History.Plaintext look encrypted, and were not decrypted.
	Undecrypted int64          `json:"undecrypted"`
	Members     []purge.Member `json:"members"` // after purge
	Before      int64          `json:"bytesBefore"`
	After       int64          `json:"bytesAfter"` // of all members' database files
	Left        []string       `json:"left"`       // for the operator to do
	Verified    string         `json:"next"`
}

// purge does the work. The report is nil if nothing was begun.
func (cl *cluster) purge(cmd *cobra.Command, o purgeOptions) (*purgeReport, error) {
	ctx, stderr := cmd.Context(), cmd.ErrOrStderr()
	status, err := cl.status(cmd, false)
	if err != nil {
		return nil, err
	}
	if err := status.beforePurge(); err != nil {
		return nil, err
	}
	if err := cl.checkProxies(ctx, o); err != nil {
		return nil, err
	}
	r := &purgeReport{DryRun: o.dryRun, Left: []string{}, Verified: "etcd-kms-proxy verify --data-dir DIR, on the host of each member while it is stopped, verifies the result"}
	// Compaction removes no present value, so all values that are not verified to be encrypted
	// count as plaintext.
	undecrypted := newUndecided(cl.rules)
	whyReadable := cl.whyReadable(ctx, false, undecrypted)
	readable := func(old *mvccpb.KeyValue) bool {
		before := undecrypted.beyond
		if whyReadable(old.Key, old.Value, true) == "" && undecrypted.beyond == before {
			return false
		}
		if _, _, encrypted := envelope.Split(old.Value); encrypted {
			r.Undecrypted++
		}
		return true
	}
	if r.History, err = purge.ReadHistory(ctx, cl.etcd, cl.rules, readable); err != nil {
		return nil, err
	}
	if r.Members, err = purge.Members(ctx, cl.etcd); err != nil {
		return nil, err
	}
	for _, m := range r.Members {
		r.Before += m.DBSize
		if m.Endpoint == "" {
			return nil, problem.New("every member has the plaintext: name a client URL of each under etcd.endpoints", "member %x (%s) cannot be reached: %s", m.ID, m.Name, m.Why)
		}
	}
	r.After = r.Before
	r.plan(stderr)
	if o.dryRun {
		return r, nil
	}
	if err := command.Confirm(cmd, o.yes, "Continue?"); err != nil {
		return nil, err
	}
	if err := cl.checkProxies(ctx, o); err != nil { // some time has passed
		return nil, err
	}
	record := auditlog.Record{Command: "purge", Outcome: "begun", Revision: r.History.CompactAt, Keys: r.History.Plaintext}
	if err := command.Record(cl.config, stderr, record); err != nil {
		return nil, err
	}
	err = cl.rewrite(ctx, r, o.settle, stderr)
	failure := err
	for _, m := range r.Members {
		if m.Unconfirmed != "" && err == nil {
			failure = fmt.Errorf("member %x: %s", m.ID, m.Unconfirmed)
		}
	}
	return r, errors.Join(err, command.Record(cl.config, stderr, record.Ended(failure)))
}

// beforePurge returns an error if a value or a KMS forbids a purge.
func (r *statusReport) beforePurge() error {
	for _, c := range r.Rules {
		if c.Current != c.Keys {
			return problem.New(c.beforePurge(), "under %q, %d of %s not current: purging now would leave them", c.Prefix, c.Keys-c.Current, printable.Count(c.Keys, "value is", "values are"))
		}
	}
	for _, k := range r.KMS {
		if !k.OK {
			return problem.New("run status and kms check: purge removes old values only if the present ones can be decrypted", "KMS provider %q: %s", k.Name, k.Reason)
		}
	}
	return nil
}

// checkProxies returns an error if a proxy has other rules, and so may be writing plaintext.
func (cl *cluster) checkProxies(ctx context.Context, o purgeOptions) error {
	if !cl.config.Coordination.Enabled || o.ignoreProxies {
		return nil
	}
	return cl.sameRules(ctx)
}

// plan prints what purge is going to do.
func (r *purgeReport) plan(w io.Writer) {
	h := r.History
	if h.CompactAt > 0 {
		printable.Fprintf(w, "the history from revision %d to %d holds %s: it is compacted at revision %d; watches from earlier revisions must start again\n",
			h.Compacted+1, h.Present, r.found(""), h.CompactAt)
	} else {
		printable.Fprintf(w, "the history from revision %d to %d holds no plaintext\n", h.Compacted+1, h.Present)
	}
	for _, m := range r.Members {
		role := ""
		if m.Leader {
			role = ", the leader"
		}
		printable.Fprintf(w, "member %x at %s%s: %s, of which %s are in use: it is defragmented, and does not respond meanwhile\n", m.ID, m.Endpoint, role, size(m.DBSize), size(m.InUse))
	}
}

// rewrite compacts and defragments.
func (cl *cluster) rewrite(ctx context.Context, r *purgeReport, settle time.Duration, stderr io.Writer) error {
	err := r.History.Remove(ctx, cl.etcd, r.Members, settle, func(m *purge.Member, before int64, took time.Duration) {
		r.After += m.DBSize - before
		printable.Fprintf(stderr, "member %x at %s: %s, %.1f s\n", m.ID, m.Endpoint, size(m.DBSize), took.Seconds())
	})
	for _, m := range r.Members {
		if m.Unconfirmed != "" {
			r.Left = append(r.Left, fmt.Sprintf("member %x at %s may still have the old values, and is not defragmented: %s; run purge again", m.ID, m.Endpoint, m.Unconfirmed))
		}
	}
	if err != nil {
		return err
	}
	r.Left = append(r.Left,
		"write-ahead logs of each member (member/wal): etcd removes a file once it is full (64 MB of writes), a later snapshot exists, and --max-wals newer files exist; a member that is removed and added again with an empty data directory has none",
		"backups and snapshots from before: delete them when they are no longer needed",
		"free space of the file systems, where the old database files were, as for any deleted file")
	return nil
}

// found says how many values purge removes from the history. A value that looks encrypted and does
// not decrypt, for example because its key is lost, is removed too, but is not called plaintext.
func (r *purgeReport) found(old string) string {
	var parts []string
	if plaintext := r.History.Plaintext - r.Undecrypted; plaintext > 0 || r.Undecrypted == 0 {
		parts = append(parts, printable.Count(plaintext, old+"plaintext value", old+"plaintext values"))
	}
	if r.Undecrypted > 0 {
		parts = append(parts, printable.Count(r.Undecrypted, old+"value that was not decrypted", old+"values that were not decrypted"))
	}
	return strings.Join(parts, " and ")
}

// text prints the report for people.
func (r *purgeReport) text(w io.Writer) {
	if r.DryRun {
		printable.Fprintf(w, "dry run: nothing was changed\n")
		return
	}
	printable.Fprintf(w, "%s removed from the history; database files: %s before, %s now\n", r.found("old "), size(r.Before), size(r.After))
	if len(r.Left) > 0 {
		printable.Fprintf(w, "left to do:\n")
	}
	for _, l := range r.Left {
		printable.Fprintf(w, "  - %s\n", l)
	}
	printable.Fprintf(w, "%s\n", r.Verified)
}
