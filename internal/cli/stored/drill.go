package stored

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/etcdclient"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/drill"
)

// NewDrill returns the command drill.
func NewDrill() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "drill",
		Short: "rehearse the loss of the KMS keys: restore a snapshot, decrypt it with what is left",
		Long: `drill restores a snapshot into a throw-away etcd, decrypts its values with the keys that are left
after a disaster, and reports what would be readable, what would be missing and why, and how long it
takes. It changes nothing: it takes the snapshot from etcd itself, or reads that of --snapshot, and
it never writes to the real etcd.

By default, every provider is treated as lost that is in no rule's recovery: nothing of it is read
or called, neither its KMS nor its key file. --lost names the providers that are lost instead, for
another disaster. --identity adds the private keys of providers of kind age.

drill needs the programs etcd and etcdutl (or an etcdctl older than 3.6) of the version that a
restore would use. The throw-away etcd listens on a unix socket in a folder that only this user can
enter, and on no network. The folder is removed at the end, also after Ctrl-C. It needs about twice
the space of the snapshot, and 128 MiB.

--metrics-file writes the result for the textfile collector of Prometheus' node_exporter, so that an
alert can say that the last drill failed, or that the last good one was long ago. With an audit
block in the configuration, the drill is recorded, and status and kms check say when each recovery
key was last tested. If the KMS that is left does not respond, or there is no value to decrypt, the
exit code is 3.`,
		Args: command.NoArgs,
	}
	path, out := command.ConfigFlag(cmd), command.OutputFlag(cmd)
	var o drillOptions
	f := cmd.Flags()
	f.StringVar(&o.snapshot, "snapshot", "", "restore the snapshot `FILE` of etcdctl snapshot save, instead of one that is taken from etcd now")
	f.StringArrayVar(&o.lost, "lost", nil, "treat the provider `NAME` as lost; may be repeated. By default, those that are in no rule's recovery are lost")
	f.IntVar(&o.sample, "sample", 0, "decrypt only this many values of each KMS key of a rule, at random; 0: all of them")
	f.StringVar(&o.etcd, "etcd", "etcd", "the `PROGRAM` etcd")
	f.StringVar(&o.etcdutl, "etcdutl", "etcdutl", "the `PROGRAM` etcdutl, or an etcdctl older than 3.6")
	f.StringVar(&o.workDir, "work-dir", "", "make the temporary folder in `DIR`; by default in that of the system")
	f.StringVar(&o.metrics, "metrics-file", "", "write metrics of the result to `FILE`, which ends in .prom")
	f.BoolVar(&o.list, "list", false, "list the keys of the values that were not decrypted")
	wait, identities := timeoutFlag(cmd), identityFlag(cmd)
	cmd.RunE = command.Run(func(cmd *cobra.Command, _ []string) error {
		o.identities, o.wait = *identities, *wait
		if err := o.check(); err != nil {
			return err
		}
		ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
		defer stop()
		cmd.SetContext(ctx)
		c, err := command.LoadConfig(cmd, *path, config.Checks{KMSFilesMayMiss: true}) // those of the providers that are left are checked below
		if err != nil {
			return err
		}
		if o.lost, err = lostProviders(c, o.lost, *path); err != nil {
			return err
		}
		report, err := o.run(cmd, c)
		if report != nil {
			err = errors.Join(out.Write(cmd.OutOrStdout(), report, report.text), err)
		}
		return err
	})
	return cmd
}

type drillOptions struct {
	snapshot, etcd, etcdutl, workDir, metrics string
	lost, identities                          []string
	sample                                    int
	list                                      bool
	wait                                      time.Duration
}

func (o *drillOptions) check() error {
	switch {
	case o.sample < 0:
		return command.Usage("", "--sample must be at least 0")
	case o.metrics != "" && filepath.Ext(o.metrics) != ".prom":
		return command.Usage("name it etcd_kms_proxy_drill.prom, in the folder of --collector.textfile.directory", "--metrics-file %q: node_exporter reads only files that end in .prom", o.metrics)
	}
	if o.metrics != "" {
		if err := checkMetricsFile(o.metrics); err != nil {
			return problem.New("create the folder for the user of this command, or name another", "--metrics-file: %w", err)
		}
	}
	return command.Positive("--timeout", o.wait)
}

// lostProviders returns the providers that are treated as lost: the named ones, or all that no
// rule has as a recovery provider.
func lostProviders(c *config.Config, named []string, path string) ([]string, error) {
	recovery := make(map[string]bool)
	for _, r := range c.Rules {
		for _, name := range r.Recovery {
			recovery[name] = true
		}
	}
	var all, lost []string
	for _, k := range c.KMS {
		all = append(all, k.Name)
		if !recovery[k.Name] {
			lost = append(lost, k.Name)
		}
	}
	for _, name := range named {
		if !slices.Contains(all, name) {
			return nil, command.Usage("the providers are under kms in "+path, "--lost %q: there is no such provider", name)
		}
	}
	if len(named) > 0 {
		return named, nil
	}
	if len(lost) == 0 {
		return nil, command.Usage("name the providers that are lost with --lost", "every provider is a recovery provider of a rule, so that none would be lost")
	}
	return lost, nil
}

// run makes the drill, its records and its metrics. The report is nil if there was none.
func (o *drillOptions) run(cmd *cobra.Command, c *config.Config) (report *drillReport, err error) {
	reason := command.WithIdentity(fmt.Sprintf("of %s, without %s", cmp.Or(o.snapshot, "etcd"), strings.Join(o.lost, ", ")), o.identities)
	record := func(r auditlog.Record) error {
		r.Command = "drill"
		return command.Record(c, cmd.ErrOrStderr(), r)
	}
	if err := record(auditlog.Record{Outcome: "begun", Reason: reason}); err != nil {
		return nil, err
	}
	report, err = o.rehearse(cmd, c)
	failure := err
	if err == nil && !report.OK {
		failure = errors.New("values would be missing")
	}
	var end auditlog.Record
	var tests []auditlog.Record
	if report != nil {
		end.Keys, tests = report.Readable, report.tested
	}
	problems := []error{err, record(end.Ended(failure))}
	for _, test := range tests {
		problems = append(problems, record(test))
	}
	if o.metrics != "" {
		if err := writeDrillMetrics(o.metrics, report, failure == nil, time.Now()); err != nil {
			problems = append(problems, fmt.Errorf("--metrics-file: %w", err))
		}
	}
	err = errors.Join(problems...)
	if err == nil && failure != nil {
		err = command.ErrFindings
	}
	return report, err
}

// rehearse makes the drill. With a report, the error says why it does not show that all is well,
// although no value is missing.
func (o *drillOptions) rehearse(cmd *cobra.Command, c *config.Config) (_ *drillReport, err error) {
	ctx, begin := cmd.Context(), time.Now()
	cl, err := openCluster(cmd, c, clusterOptions{inspectOnly: true, identities: o.identities, wait: o.wait, noEtcd: true, lost: o.lost})
	if err != nil {
		return nil, err
	}
	defer cl.close()
	report := &drillReport{Snapshot: drillSnapshot{File: o.snapshot}, Lost: o.lost, Sample: o.sample, Unreadable: []statusKey{}}
	folder, err := os.MkdirTemp(o.workDir, "drill-") // mode 0700
	if err != nil {
		return nil, problem.WithHint(err, "name a folder with enough space with --work-dir")
	}
	defer func() {
		if rerr := os.RemoveAll(folder); rerr != nil {
			err = errors.Join(err, fmt.Errorf("remove the temporary folder: %w", rerr))
		}
	}()
	defer func() {
		if err != nil && ctx.Err() != nil { // what failed is a consequence
			err = fmt.Errorf("the drill was stopped: %w", context.Cause(ctx))
		}
	}()
	file := o.snapshot
	if file == "" {
		file = filepath.Join(folder, "snapshot.db")
		if err := o.takeSnapshot(ctx, cl, file, cmd.ErrOrStderr()); err != nil {
			return nil, err
		}
		report.Seconds.Snapshot = time.Since(begin).Seconds()
	}
	info, err := os.Stat(file)
	if err != nil {
		return nil, problem.WithHint(err, "name a file of etcdctl snapshot save with --snapshot")
	}
	report.Snapshot.Bytes = info.Size()
	if o.snapshot != "" {
		report.Snapshot.Modified = info.ModTime().UTC().Truncate(time.Second)
	}
	etcd, err := drill.Restore(ctx, drill.Config{Etcd: o.etcd, Etcdutl: o.etcdutl, Snapshot: file, Folder: folder, Ready: cl.useThrowAway})
	if err != nil {
		return nil, o.explain(err)
	}
	defer etcd.Close()
	report.Etcd, report.Etcdutl = etcd.Version, etcd.Tool
	report.Seconds.Restore, report.Seconds.Start = etcd.Restored.Seconds(), etcd.Started.Seconds()
	decrypting := time.Now()
	options := drill.Options{Sample: o.sample}
	if o.list {
		options.Left = func(kv *mvccpb.KeyValue, state keyring.ValueState, why string) {
			report.Unreadable = append(report.Unreadable, newStatusKey(kv, state, why))
		}
	}
	report.Rules, report.Snapshot.Revision, err = drill.Open(ctx, cl.etcd, cl.rules, options)
	if err != nil {
		return nil, o.explain(err)
	}
	report.Seconds.Decrypt, report.Seconds.Total = time.Since(decrypting).Seconds(), time.Since(begin).Seconds()
	report.addKeys(cl)
	return report, report.conclude()
}

// takeSnapshot saves a snapshot of the real etcd to a new file. It only reads from etcd.
func (o *drillOptions) takeSnapshot(ctx context.Context, cl *cluster, file string, stderr io.Writer) (err error) {
	source := &cluster{config: cl.config}
	if source.etcd, _, err = etcdclient.New(cl.config, cl.log); err != nil {
		return err
	}
	defer func() { _ = source.etcd.Close() }() // it returns the end of its own context
	limited, cancel := context.WithTimeout(ctx, o.wait)
	defer cancel()
	if err := source.reach(limited, stderr); err != nil {
		return err
	}
	in, err := source.etcd.Snapshot(ctx)
	if err != nil {
		return explainSnapshot(err)
	}
	defer func() { _ = in.Close() }()                                     // it was read to its end, or there is an error
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600) //nolint:gosec // in a folder of this process
	if err != nil {
		return err
	}
	_, err = io.Copy(f, in)
	if err = errors.Join(err, f.Close()); err != nil {
		return explainSnapshot(err)
	}
	return nil
}

// explainSnapshot adds a hint to the error of a snapshot that was not taken.
func explainSnapshot(err error) error {
	denied := isDenied(err)
	if err = fmt.Errorf("take a snapshot of etcd: %w", err); denied {
		return problem.WithHint(err, "set etcd.username and etcd.passwordFile to a user with the role root, or use --snapshot")
	}
	return err
}

// useThrowAway connects to the throw-away etcd, and returns an error until that responds.
func (cl *cluster) useThrowAway(ctx context.Context, endpoint string) error {
	if cl.etcd == nil {
		c := *cl.config
		// the users of the snapshot are those of the real etcd
		c.Etcd.Endpoints, c.Etcd.HTTPEndpoints, c.Etcd.TLS = []string{endpoint}, nil, nil
		var err error
		if cl.etcd, _, err = etcdclient.New(&c, cl.log); err != nil {
			return err
		}
	}
	_, err := cl.etcd.Get(ctx, "\x00", clientv3.WithLimit(1), clientv3.WithKeysOnly())
	if ctx.Err() == nil && isDenied(err) {
		return nil // it responds; reading the values will show what it denies
	}
	return err
}

// explain adds hints to the errors of a drill.
func (o *drillOptions) explain(err error) error {
	switch {
	case errors.Is(err, drill.ErrLongPath):
		return problem.WithHint(err, "use a --work-dir with a shorter path")
	case isDenied(err):
		return problem.WithHint(err, "the snapshot has etcd's authentication turned on: set etcd.username and etcd.passwordFile to a user that could read the values when it was taken")
	case isMissingProgram(err):
		return problem.WithHint(err, "name the programs with --etcd and --etcdutl")
	case strings.Contains(err.Error(), "no space left on device"):
		return problem.WithHint(err, "name a folder with enough space with --work-dir")
	case errors.Is(err, drill.ErrRestore):
		return problem.WithHint(err, "check that --etcdutl names etcdutl, or an etcdctl older than 3.6; if it does, the file is incomplete or damaged, or is not of etcdctl snapshot save: use another one")
	}
	return err
}

// isMissingProgram reports whether a program was not found or cannot be run.
func isMissingProgram(err error) bool {
	_, missing := errors.AsType[*exec.Error](err)
	return missing
}
