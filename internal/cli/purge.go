package cli

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"golang.org/x/term"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/purge"
)

func newPurge() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "purge",
		Short: "remove old plaintext from etcd's history and database files",
		Long: `purge removes what reencrypt leaves behind: the old plaintext in etcd's history and in the freed pages of its database files. It refuses while status finds
anything: a value that is not current, a KMS that does not answer, or a proxy with other rules, which may be writing plaintext. It looks through the history for plaintext under the rules, compacts past the last of it, waits until each member has done so in its own
files, and defragments one after the other, the leader last, each only while all others are well. A member answers nothing while it is defragmented.

What it cannot reach it names: write-ahead logs and snapshot files, which etcd replaces by and by, old backups, copies of disks, and members that do not end their
compaction, which it does not defragment. Exit code 1 says that something of that kind is left to do.`,
		Args: cobra.NoArgs,
	}
	path, out := configFlag(cmd), outputFlag(cmd)
	dryRun := cmd.Flags().Bool("dry-run", false, "say what would be done; change nothing")
	yes := cmd.Flags().Bool("yes", false, "do not ask")
	ignoreProxies := cmd.Flags().Bool("ignore-proxies", false, "do not look whether the proxies have the rules of this configuration")
	wait := cmd.Flags().Duration("timeout", 30*time.Second, "how long to wait for etcd and for each KMS at the start")
	settle := cmd.Flags().Duration("compact-timeout", 10*time.Minute, "how long to wait for each member to end its compaction")
	cmd.RunE = fails(func(cmd *cobra.Command, _ []string) error {
		c, err := loadConfig(cmd, *path)
		if err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		cmd.SetContext(ctx)
		cl, err := openCluster(cmd, c, clusterOptions{inspectOnly: true, wait: *wait})
		if err != nil {
			return err
		}
		defer cl.close()
		report, err := cl.purge(cmd, purgeOptions{*dryRun, *yes, *ignoreProxies, *settle})
		if report != nil {
			if werr := out.write(cmd.OutOrStdout(), report, report.text); err == nil {
				err = werr
			}
		}
		if err == nil && len(report.Left) > 0 {
			err = &failure{code: exitFindings}
		}
		return err
	})
	return cmd
}

type purgeOptions struct {
	dryRun, yes, ignoreProxies bool
	settle                     time.Duration // of each member's compaction
}

// purgeReport is what purge found and did.
type purgeReport struct {
	DryRun   bool           `json:"dryRun,omitempty"`
	History  purge.History  `json:"history"`
	Members  []purge.Member `json:"members"` // as they are afterwards
	Before   int64          `json:"bytesBefore"`
	After    int64          `json:"bytesAfter"` // of all members' database files
	Left     []string       `json:"left"`       // what the operator has to see to
	Verified string         `json:"next"`
}

// purge does it all. The report is nil if nothing was begun.
func (cl *cluster) purge(cmd *cobra.Command, o purgeOptions) (*purgeReport, error) {
	ctx, stderr := cmd.Context(), cmd.ErrOrStderr()
	status, err := cl.status(cmd, false)
	if err != nil {
		return nil, err
	}
	if err := status.beforePurge(); err != nil {
		return nil, err
	}
	if err := cl.sameRules(ctx, o); err != nil {
		return nil, err
	}
	r := &purgeReport{DryRun: o.dryRun, Left: []string{}, Verified: "etcd-kms-proxy verify --data-dir DIR, on each member's host while it is stopped, proves it"}
	// Whatever is not proven to be sealed goes: compaction takes nothing that is of use.
	unopened := newDoubts(cl.rules)
	judge := cl.judge(ctx, false, unopened)
	readable := func(old *mvccpb.KeyValue) bool {
		before := unopened.beyond
		return judge(old.Key, old.Value, true) != "" || unopened.beyond > before
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
			return nil, &failure{
				code: exitFailure, err: fmt.Errorf("member %x (%s) cannot be reached: %s", m.ID, m.Name, m.Why),
				hint: "every member holds the plaintext: name a client URL of each under etcd.endpoints",
			}
		}
	}
	r.After = r.Before
	r.plan(stderr)
	if o.dryRun {
		return r, nil
	}
	if err := confirm(cmd, o.yes, "Go on?"); err != nil {
		return nil, err
	}
	if err := cl.sameRules(ctx, o); err != nil { // a while has passed
		return nil, err
	}
	record := func(outcome, reason string) error {
		return recordCommand(cl.config, stderr, auditlog.Record{Command: "purge", Outcome: outcome, Reason: reason, Revision: r.History.CompactAt, Keys: r.History.Plaintext})
	}
	if err := record("begun", ""); err != nil {
		return nil, err
	}
	err = cl.rewrite(ctx, r, o.settle, stderr)
	outcome, reason := "ok", ""
	for _, m := range r.Members {
		if m.Unproven != "" {
			outcome, reason = "failed", fmt.Sprintf("member %x: %s", m.ID, m.Unproven)
		}
	}
	if err != nil {
		outcome, reason = "failed", err.Error()
	}
	return r, errors.Join(err, record(outcome, reason))
}

// beforePurge says what is in the way of a purge but for the proxies.
func (r *statusReport) beforePurge() error {
	for _, c := range r.Rules {
		if c.Current != c.Keys {
			return &failure{
				code: exitFailure, err: fmt.Errorf("of %d values under %q, only %d are as the rule writes them: purging now would leave the others", c.Keys, c.Prefix, c.Current),
				hint: c.beforePurge(),
			}
		}
	}
	for _, k := range r.KMS {
		if !k.OK {
			return &failure{code: exitFailure, err: fmt.Errorf("KMS provider %q: %s", k.Name, k.Reason), hint: "run status and kms check: what is kept should be seen to open before the rest is dropped"}
		}
	}
	return nil
}

// sameRules finds a proxy that has other rules, and so may be writing what is to be purged.
func (cl *cluster) sameRules(ctx context.Context, o purgeOptions) error {
	if !cl.config.Coordination.Enabled || o.ignoreProxies {
		return nil
	}
	err := cl.fleet().SameRules(ctx)
	if errors.Is(err, coordination.ErrOtherRules) {
		return &failure{code: exitFailure, err: err, hint: "give all proxies this configuration first (see status), or use --ignore-proxies"}
	}
	return err
}

// plan says what is going to happen.
func (r *purgeReport) plan(w io.Writer) {
	h := r.History
	if h.CompactAt > 0 {
		printf(w, "the history from revision %d to %d holds %d plaintext values: it is compacted at revision %d; a watch from an earlier revision has to start again\n",
			h.Compacted+1, h.Present, h.Plaintext, h.CompactAt)
	} else {
		printf(w, "the history from revision %d to %d holds no plaintext\n", h.Compacted+1, h.Present)
	}
	for _, m := range r.Members {
		role := ""
		if m.Leader {
			role = ", the leader"
		}
		printf(w, "member %x at %s%s: %s, of which %s are in use: it is defragmented, and answers nothing meanwhile\n", m.ID, m.Endpoint, role, size(m.DBSize), size(m.InUse))
	}
}

// rewrite compacts and defragments.
func (cl *cluster) rewrite(ctx context.Context, r *purgeReport, settle time.Duration, stderr io.Writer) error {
	err := r.History.Remove(ctx, cl.etcd, r.Members, settle, func(m *purge.Member, before int64, took time.Duration) {
		r.After += m.DBSize - before
		printf(stderr, "member %x at %s: %s, %.1f s\n", m.ID, m.Endpoint, size(m.DBSize), took.Seconds())
	})
	for _, m := range r.Members {
		if m.Unproven != "" {
			r.Left = append(r.Left, fmt.Sprintf("member %x at %s is not proven to have dropped the old values, and is not defragmented: %s; run purge again", m.ID, m.Endpoint, m.Unproven))
		}
	}
	if err != nil {
		return err
	}
	r.Left = append(r.Left,
		"write-ahead logs of each member (member/wal): etcd drops one once it is full, which is after 64 MB of writes, a snapshot was taken behind it, and --max-wals newer ones exist; a member that is removed and added anew with an empty data directory has none",
		"backups and snapshots from before: delete them when they are no longer needed",
		"free space of the file systems, where the old database files were: the same as for any deleted file")
	return nil
}

// text prints the report for people.
func (r *purgeReport) text(w io.Writer) {
	if r.DryRun {
		printf(w, "dry run: nothing was changed\n")
		return
	}
	printf(w, "%d old plaintext values dropped from the history; database files: %s before, %s now\n", r.History.Plaintext, size(r.Before), size(r.After))
	if len(r.Left) > 0 {
		printf(w, "left to do:\n")
	}
	for _, l := range r.Left {
		printf(w, "  - %s\n", l)
	}
	printf(w, "%s\n", r.Verified)
}

// confirm asks on the terminal. Without one, --yes must stand in for the answer.
func confirm(cmd *cobra.Command, yes bool, question string) error {
	if yes {
		return nil
	}
	in, ok := cmd.InOrStdin().(*os.File)
	if !ok || !term.IsTerminal(int(in.Fd())) {
		return &failure{code: exitUsage, err: errors.New("there is no terminal to ask on"), hint: "--yes goes on without asking"}
	}
	printf(cmd.ErrOrStderr(), "%s [y/N] ", question)
	answer, err := bufio.NewReader(in).ReadString('\n')
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if a := strings.ToLower(strings.TrimSpace(answer)); a != "y" && a != "yes" {
		return &failure{code: exitFailure, err: errors.New("not confirmed: nothing was done")}
	}
	return nil
}
