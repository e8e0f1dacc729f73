package stored

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/api/v3/mvccpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config/kubernetes"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/etcdfile"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/purge"
)

// NewVerify returns the command verify.
func NewVerify() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "verify that no value under a rule is readable without the KMS",
		Long: `verify searches for values under the rules that can be read without the KMS, and reports what it did
not check. Without a flag it reads etcd: every present value, and the history back to the last
compaction. With --snapshot or --data-dir it reads files, and needs no etcd: every revision in the
database, freed pages and other remains, the write-ahead log, and all other bytes. Files that are
compressed with gzip, zip or bzip2 are searched without writing anything to disk; other compressed
files are reported as not checked.

It recognizes plaintext by its key, by the form of Kubernetes objects, and by the --canary strings
that you have put into values. A value that looks encrypted must decrypt, or with --offline be
well-formed. A value whose DEK seed the KMS refuses to unwrap, while it unwraps others, is a finding
too. verify changes nothing, and prints no value. If nothing was found but not everything could be
checked, the exit code is 3.`,
		Args: command.NoArgs,
	}
	path, out := command.ConfigFlag(cmd), command.OutputFlag(cmd)
	var o verifyOptions
	cmd.Flags().StringVar(&o.snapshot, "snapshot", "", "check the snapshot `FILE` of etcdctl snapshot save, or another single file")
	cmd.Flags().StringVar(&o.dataDir, "data-dir", "", "check the data directory `DIR` of a stopped member")
	cmd.Flags().StringVar(&o.walDir, "wal-dir", "", "with --data-dir, check also the write-ahead log in `DIR`, if the member has --wal-dir")
	cmd.Flags().StringArrayVar(&o.canaries, "canary", nil, "a `STRING` that must not be found, also not in base64; may be repeated")
	cmd.Flags().StringVar(&o.canaryFile, "canary-file", "", "a `FILE` with such strings, one per line")
	cmd.Flags().StringArrayVar(&o.kinds, "kind", nil, "a `KIND` of Kubernetes objects that must not be found in plaintext, for example Secret; by default the kinds of the rules' resources")
	cmd.Flags().BoolVar(&o.offline, "offline", false, "call no KMS: encrypted values must be well-formed, and are not decrypted; for files only")
	cmd.Flags().BoolVar(&o.all, "list", false, "print every finding, not only a few of each file and reason")
	wait, identities := timeoutFlag(cmd), identityFlag(cmd)
	cmd.RunE = command.RunUntilSignal(func(cmd *cobra.Command, _ []string) error {
		if o.snapshot != "" && o.dataDir != "" {
			return command.Usage("", "--snapshot and --data-dir cannot be used together")
		}
		if o.offline && len(*identities) > 0 {
			return command.Usage("", "--offline and --identity cannot be used together")
		}
		files := cmp.Or(o.snapshot, o.dataDir)
		if files == "" && (o.offline || len(o.canaries) > 0 || o.canaryFile != "" || len(o.kinds) > 0) {
			return command.Usage("add --snapshot or --data-dir", "--offline, --canary, --canary-file and --kind are for files")
		}
		if o.dataDir == "" && o.walDir != "" {
			return command.Usage("add --data-dir", "--wal-dir belongs to a data directory")
		}
		ctx := cmd.Context()
		cl, err := loadCluster(cmd, *path, clusterOptions{inspectOnly: true, identities: *identities, wait: *wait, noEtcd: files != "", noKMS: o.offline})
		if err != nil {
			return err
		}
		defer cl.close()
		report := newVerifyReport(newUndecided(cl.rules))
		if files == "" {
			err = cl.verifyEtcd(ctx, report)
		} else {
			err = cl.verifyFiles(ctx, o, report)
		}
		if err == nil {
			err = ctx.Err() // which the last values may have failed for
		}
		if err != nil {
			return err
		}
		report.undecided.decide(ctx, report.addFinding, report.addUndecrypted)
		if report.Undecrypted > 0 {
			report.NotChecked = append(report.NotChecked, "whether "+printable.Count(report.Undecrypted, "well-formed value", "well-formed values")+" can be decrypted: the KMS does not respond, or decrypts no value")
		}
		report.OK = report.Count == 0 && report.Undecrypted == 0 && report.Damaged == 0
		if err := out.Write(cmd.OutOrStdout(), report, func(w io.Writer) { report.text(w, o.all) }); err != nil {
			return err
		}
		switch {
		case report.Count > 0:
			return command.ErrFindings
		case report.Damaged > 0:
			return problem.New("see NOTES in the report", "%s could not be decoded: nothing was found, but not everything was checked", printable.Count(report.Damaged, "file", "files"))
		case report.Undecrypted > 0:
			return problem.New("check their KMS; see status", "%s could not be decrypted, and may not be encrypted", printable.Count(report.Undecrypted, "value", "values"))
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

// whyReadable returns a function that says why a value may be readable without the KMS, or "": it
// is not encrypted, or it only looks encrypted, since it does not decrypt. Values whose DEK seed
// the KMS did not unwrap are added to open.
func (cl *cluster) whyReadable(ctx context.Context, offline bool, open *undecided) func(key, value []byte, whole bool) string {
	return func(key, value []byte, whole bool) string {
		rule := cl.rules.Of(key)
		if rule == nil || rule.WriteWith == inventory.Plaintext {
			return ""
		}
		if !rule.Sealer.Sealed(value) {
			if !whole && len(value) < len(envelope.Root) && strings.HasPrefix(envelope.Root, string(value)) {
				return "" // too little is left to tell
			}
			return "it is not encrypted by a provider of its rule"
		}
		if !whole {
			return ""
		}
		if _, object, ok := envelope.Split(value); ok {
			if _, err := envelope.Parse(object); err != nil {
				return "it begins like an encrypted value, and is none: " + err.Error()
			}
		}
		if offline {
			return ""
		}
		_, _, err := rule.Sealer.Inspect(ctx, key, value)
		e, ok := errors.AsType[*keyring.Error](err)
		switch {
		case err == nil:
			return open.note(key, value, nil)
		case ctx.Err() != nil:
			return ""
		case !ok:
			return "it begins like an encrypted value, and cannot be decrypted"
		case e.Kind == keyring.Unavailable, e.Responded():
			return open.note(key, value, e)
		}
		return "it begins like an encrypted value, and cannot be decrypted: " + e.Text
	}
}

// verifyEtcd checks the present values and the history.
func (cl *cluster) verifyEtcd(ctx context.Context, r *verifyReport) error {
	whyReadable := cl.whyReadable(ctx, false, r.undecided)
	check := func(place etcdfile.Place, kv *mvccpb.KeyValue) (found bool) {
		r.Values++
		why := whyReadable(kv.Key, kv.Value, true)
		if why != "" {
			r.found(etcdfile.Finding{File: "etcd", Place: place, Key: string(kv.Key), Revision: kv.ModRevision, Offset: -1, Why: why})
		}
		return why != ""
	}
	span, err := inventory.Scan(ctx, cl.etcd, cl.rules.Prefixes(), 0, func(kv *mvccpb.KeyValue) error {
		if cl.rules.Of(kv.Key) != nil {
			check(etcdfile.Live, kv)
		}
		return nil
	})
	if err != nil {
		return err
	}
	h, err := purge.ReadHistory(ctx, cl.etcd, cl.rules, func(kv *mvccpb.KeyValue) bool { return check(etcdfile.History, kv) })
	if err != nil {
		return err
	}
	r.NotChecked = []string{
		fmt.Sprintf("values that etcd removed at or before revision %d, its last compaction: they may remain in freed pages of the database files", h.Compacted),
		"etcd's files: freed pages, write-ahead logs, snapshots. --data-dir checks those of a stopped member, --snapshot a snapshot",
		"backups, and other copies of etcd's disks",
	}
	if span.First != span.Last {
		r.NotChecked = append(r.NotChecked, fmt.Sprintf("etcd was compacted meanwhile: present values were read at revisions %d to %d", span.First, span.Last))
	}
	return nil
}

// verifyFiles checks files.
func (cl *cluster) verifyFiles(ctx context.Context, o verifyOptions, r *verifyReport) error {
	files, passed, err := o.files()
	if err != nil {
		return err
	}
	c := etcdfile.Config{Judge: cl.whyReadable(ctx, o.offline, r.undecided), Kinds: o.kinds, Found: r.found}
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
		f, err := etcdfile.Inspect(ctx, name, c)
		if err != nil {
			return problem.New("", "%s: %w", name, err)
		}
		if rel, err := filepath.Rel(o.dataDir, name); err == nil && o.dataDir != "" && filepath.IsLocal(rel) {
			f.Path = rel
		}
		r.addFile(f, o.snapshot != "")
	}
	for _, name := range passed {
		r.NotChecked = append(r.NotChecked, name+", which is not a regular file")
	}
	r.NotChecked = append(r.NotChecked,
		"other members' files, and backups: run verify on each",
		"free space of the file system, swap, and the memory of etcd")
	if len(c.Canaries) == 0 {
		r.NotChecked = append(r.NotChecked, "values whose first bytes are lost: only a --canary finds them")
	}
	if slices.Contains(c.Prefixes, "") {
		r.NotChecked = append(r.NotChecked, "remains of values by their keys, since a rule covers every key")
	}
	for _, p := range shapeless {
		r.NotChecked = append(r.NotChecked, fmt.Sprintf("Kubernetes objects below %q by their form, or some of them: their kind is not known, or not among those of --kind", p))
	}
	if o.offline {
		r.NotChecked = append(r.NotChecked, "whether encrypted values can be decrypted, since --offline calls no KMS")
	}
	return nil
}

// files returns the files to check, and other entries of the folder.
func (o *verifyOptions) files() (files, passed []string, err error) {
	if o.dataDir != "" {
		if files, passed, err = etcdfile.MemberFiles(o.dataDir, o.walDir); err != nil {
			err = problem.WithHint(err, "name the folder that contains member/snap/db and member/wal; use --wal-dir if the log is elsewhere, and --snapshot for a single file")
		}
		return files, passed, err
	}
	info, err := os.Stat(o.snapshot)
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", o.snapshot)
	}
	return []string{o.snapshot}, nil, err
}

// kindsOf returns the kinds of Kubernetes objects under rules that encrypt, or the given ones, and
// the prefixes below which there may be objects of other kinds.
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
		case !all && len(known) == 0: // the operator knows what is there
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
