package cli

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config/kubernetes"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/etcdfile"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/purge"
)

func newVerify() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "prove that no value under a rule is readable without the KMS",
		Long: `verify looks for values under the rules that can be read without the KMS, and says what it did not look at. Without a flag it looks at etcd itself: every
present value, and the history back to the last compaction. With --snapshot or --data-dir it looks at files, and needs no etcd: every revision in the database, freed
pages and other remains, the write-ahead log, and all other bytes. Files that are compressed with gzip, zip or bzip2 are searched without writing anything to disk; other
compressed files are named as not looked at.

It knows plaintext by its key, by the shape of Kubernetes' objects, and by the --canary strings that you have put into values. A value that begins like a sealed one has
to open, or with --offline to be well-formed. It changes nothing, and prints no value. A value whose DEK seed its KMS refuses, while it
unwraps those of others, is a finding too. Exit code 1 says that something was found, and 3 that nothing was, where not
everything could be looked at.`,
		Args: cobra.NoArgs,
	}
	path, out := configFlag(cmd), outputFlag(cmd)
	var o verifyOptions
	cmd.Flags().StringVar(&o.snapshot, "snapshot", "", "look at the snapshot `FILE` of etcdctl snapshot save, or at another single file")
	cmd.Flags().StringVar(&o.dataDir, "data-dir", "", "look at the data directory `DIR` of a stopped member")
	cmd.Flags().StringVar(&o.walDir, "wal-dir", "", "look at the write-ahead log in `DIR` too, if the member has --wal-dir; with --data-dir")
	cmd.Flags().StringArrayVar(&o.canaries, "canary", nil, "a `STRING` that must not be found, nor in base64; may be repeated")
	cmd.Flags().StringVar(&o.canaryFile, "canary-file", "", "a `FILE` with such strings, one a line")
	cmd.Flags().StringArrayVar(&o.kinds, "kind", nil, "a `KIND` of Kubernetes objects that must not be found in the clear, as they spell it: Secret; by default those of the rules' resources")
	cmd.Flags().BoolVar(&o.offline, "offline", false, "ask no KMS: sealed values have to be well-formed, and are not opened; files only")
	cmd.Flags().BoolVar(&o.all, "list", false, "print every finding, and not the first 20 of a file")
	wait := cmd.Flags().Duration("timeout", 30*time.Second, "how long to wait for etcd and for each KMS at the start")
	cmd.MarkFlagsMutuallyExclusive("snapshot", "data-dir")
	cmd.RunE = fails(func(cmd *cobra.Command, _ []string) error {
		files := cmp.Or(o.snapshot, o.dataDir)
		if files == "" && (o.offline || len(o.canaries) > 0 || o.canaryFile != "" || len(o.kinds) > 0) {
			return &failure{code: exitUsage, err: errors.New("--offline, --canary, --canary-file and --kind are for files"), hint: "add --snapshot or --data-dir"}
		}
		if o.dataDir == "" && o.walDir != "" {
			return &failure{code: exitUsage, err: errors.New("--wal-dir belongs to a data directory"), hint: "add --data-dir"}
		}
		c, err := loadConfig(cmd, *path)
		if err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		cmd.SetContext(ctx)
		cl, err := openCluster(cmd, c, clusterOptions{inspectOnly: true, wait: *wait, noEtcd: files != "", noKMS: o.offline})
		if err != nil {
			return err
		}
		defer cl.close()
		report := &verifyReport{Files: []etcdfile.File{}, Findings: []etcdfile.Finding{}, doubts: newDoubts(cl.rules)}
		if files == "" {
			err = cl.verifyEtcd(ctx, report)
		} else {
			err = cl.verifyFiles(ctx, o, report)
		}
		if err == nil {
			err = ctx.Err() // what was opened last may have failed for that
		}
		if err != nil {
			return err
		}
		report.decide(ctx)
		if report.Unopened > 0 {
			report.Unseen = append(report.Unseen, fmt.Sprintf("whether %d values that are well-formed open: their KMS does not answer, or answers for no value", report.Unopened))
		}
		report.OK = report.Count == 0 && report.Unopened == 0 && report.Damaged == 0
		if err := out.write(cmd.OutOrStdout(), report, func(w io.Writer) { report.text(w, o.all) }); err != nil {
			return err
		}
		switch {
		case report.Count > 0:
			return &failure{code: exitFindings}
		case report.Damaged > 0:
			return &failure{code: exitFailure, err: fmt.Errorf("%d files could not be decoded: nothing was found, but not everything was looked at", report.Damaged), hint: "NOTES in the report say why"}
		case report.Unopened > 0:
			return &failure{code: exitFailure, err: fmt.Errorf("%d values could not be opened to make sure that they are sealed", report.Unopened), hint: "see to their KMS; status says more"}
		}
		return nil
	})
	return cmd
}

type verifyOptions struct {
	snapshot, dataDir, walDir, canaryFile string
	canaries, kinds                       []string
	offline, all                          bool
}

// judge tells why a value should not be readable: it is not sealed, or only looks so. What does not open may be anything in an envelope's clothes. What its KMS did not
// unwrap is for doubts to decide.
func (cl *cluster) judge(ctx context.Context, offline bool, doubts *doubts) func(key, value []byte, whole bool) string {
	return func(key, value []byte, whole bool) string {
		rule := cl.rules.Of(key)
		if rule == nil || rule.WriteWith == inventory.Plaintext {
			return ""
		}
		if !rule.Sealer.Sealed(value) {
			if !whole && len(value) < len(envelope.Root) && strings.HasPrefix(envelope.Root, string(value)) {
				return "" // too little is left to tell
			}
			return "it is not sealed by a provider of its rule"
		}
		if !whole {
			return ""
		}
		if _, object, ok := envelope.Split(value); ok {
			if _, err := envelope.Parse(object); err != nil {
				return "it begins like a sealed value, and is none: " + err.Error()
			}
		}
		if offline {
			return ""
		}
		_, _, err := rule.Sealer.Inspect(ctx, key, value)
		e, ok := errors.AsType[*keyring.Error](err)
		switch {
		case err == nil:
			return doubts.inspected(key, value, nil)
		case ctx.Err() != nil:
			return ""
		case !ok:
			return "it begins like a sealed value, and does not open"
		case e.Kind == keyring.Unavailable, e.Answered():
			return doubts.inspected(key, value, e)
		}
		return "it begins like a sealed value, and does not open: " + e.Text
	}
}

// verifyEtcd looks at the present values, and at the history.
func (cl *cluster) verifyEtcd(ctx context.Context, r *verifyReport) error {
	judge := cl.judge(ctx, false, r.doubts)
	span, err := inventory.Scan(ctx, cl.etcd, cl.rules.Prefixes(), 0, func(kv *mvccpb.KeyValue) error {
		if cl.rules.Of(kv.Key) == nil {
			return nil
		}
		r.Values++
		if why := judge(kv.Key, kv.Value, true); why != "" {
			r.found(etcdfile.Finding{File: "etcd", Place: etcdfile.Live, Key: string(kv.Key), Revision: kv.ModRevision, Offset: -1, Why: why})
		}
		return nil
	})
	if err != nil {
		return err
	}
	h, err := purge.ReadHistory(ctx, cl.etcd, cl.rules, func(kv *mvccpb.KeyValue) bool {
		r.Values++
		why := judge(kv.Key, kv.Value, true)
		if why != "" {
			r.found(etcdfile.Finding{File: "etcd", Place: etcdfile.History, Key: string(kv.Key), Revision: kv.ModRevision, Offset: -1, Why: why})
		}
		return why != ""
	})
	if err != nil {
		return err
	}
	r.Unseen = []string{
		fmt.Sprintf("what etcd dropped at or before revision %d, its last compaction: it may stand in freed pages of the database files", h.Compacted),
		"etcd's files: freed pages, write-ahead logs, snapshots. --data-dir looks at those of a stopped member, --snapshot at a snapshot",
		"backups, and other copies of etcd's disks",
	}
	if span.First != span.Last {
		r.Unseen = append(r.Unseen, fmt.Sprintf("etcd was compacted meanwhile: present values were looked at from revision %d to %d", span.First, span.Last))
	}
	return nil
}

// verifyFiles looks at files.
func (cl *cluster) verifyFiles(ctx context.Context, o verifyOptions, r *verifyReport) error {
	files, passed, err := o.files()
	if err != nil {
		return err
	}
	c := etcdfile.Config{Judge: cl.judge(ctx, o.offline, r.doubts), Kinds: o.kinds, Found: r.found}
	for _, rule := range cl.rules.All() {
		if rule.WriteWith != inventory.Plaintext {
			c.Prefixes = append(c.Prefixes, rule.Prefix)
		}
	}
	kinds, shapeless := kindsOf(cl.rules, o.kinds)
	c.Kinds = kinds
	for _, s := range o.canaries {
		c.Canaries = append(c.Canaries, []byte(s))
	}
	if o.canaryFile != "" {
		data, err := os.ReadFile(o.canaryFile)
		if err != nil {
			return fmt.Errorf("--canary-file: %w", err)
		}
		for line := range strings.Lines(string(data)) {
			if line = strings.TrimRight(line, "\r\n"); line != "" {
				c.Canaries = append(c.Canaries, []byte(line))
			}
		}
	}
	for _, name := range files {
		f, err := etcdfile.Look(ctx, name, c)
		if err != nil {
			return &failure{code: exitFailure, err: fmt.Errorf("%s: %w", name, err)}
		}
		if rel, err := filepath.Rel(o.dataDir, name); err == nil && o.dataDir != "" && filepath.IsLocal(rel) {
			f.Path = rel
		}
		r.looked(f, o.snapshot != "")
	}
	for _, name := range passed {
		r.Unseen = append(r.Unseen, name+", which is no file")
	}
	r.Unseen = append(r.Unseen,
		"other members' files, and backups: run verify on each",
		"free space of the file system, swap, and the memory of etcd")
	if len(c.Canaries) == 0 {
		r.Unseen = append(r.Unseen, "values whose beginning is lost: only a --canary finds them")
	}
	if slices.Contains(c.Prefixes, "") {
		r.Unseen = append(r.Unseen, "remains of values by their keys, since a rule is for every key")
	}
	for _, p := range shapeless {
		r.Unseen = append(r.Unseen, fmt.Sprintf("Kubernetes' objects below %q by their shape, or all of them: no kind is known for them, or it is not among those of --kind", p))
	}
	if o.offline {
		r.Unseen = append(r.Unseen, "whether sealed values open, since --offline asks no KMS")
	}
	return nil
}

// files are those to look at.
func (o *verifyOptions) files() (files, passed []string, err error) {
	if o.dataDir != "" {
		if files, passed, err = etcdfile.MemberFiles(o.dataDir, o.walDir); err != nil {
			err = &failure{code: exitFailure, err: err, hint: "it holds member/snap/db and member/wal; name the log with --wal-dir if the member has it elsewhere, and a single file with --snapshot"}
		}
		return files, passed, err
	}
	info, err := os.Stat(o.snapshot)
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is no file", o.snapshot)
	}
	return []string{o.snapshot}, nil, err
}

// kindsOf returns the kinds of Kubernetes' objects under rules that seal, or the given ones, and the prefixes below which there may be objects of other kinds.
func kindsOf(rules *inventory.Rules, given []string) (kinds, shapeless []string) {
	var clear []string
	for _, rule := range rules.All() {
		if rule.WriteWith == inventory.Plaintext {
			known, _ := kubernetes.Kinds(rule.Prefix)
			clear = append(clear, known...)
		}
	}
	for _, rule := range rules.All() {
		if rule.WriteWith == inventory.Plaintext {
			continue
		}
		known, all := kubernetes.Kinds(rule.Prefix)
		if len(known) > 1 { // a rule for everything, with exceptions
			known = slices.DeleteFunc(known, func(kind string) bool { return slices.Contains(clear, kind) })
		}
		switch {
		case len(given) == 0:
			kinds = append(kinds, known...)
		case !all && len(known) == 0: // it is for the operator to know what is there
			all = true
		default:
			all = all && !slices.ContainsFunc(known, func(kind string) bool { return !slices.Contains(given, kind) })
		}
		if !all {
			shapeless = append(shapeless, rule.Prefix)
		}
	}
	if len(given) > 0 {
		return given, shapeless
	}
	slices.Sort(kinds)
	return slices.Compact(kinds), shapeless
}
