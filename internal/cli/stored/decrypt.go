package stored

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"golang.org/x/term"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/envelope"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/etcdfile"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// NewDecrypt returns the command decrypt.
func NewDecrypt() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "decrypt KEY",
		Short: "decrypt stored values from etcd or a snapshot file, in an emergency",
		Long: `decrypt decrypts the value of KEY, an etcd key, or with --prefix the values of all keys that begin
with it. It does so as a proxy with this configuration would, also with recovery copies. It needs
the KMS but no proxy; with --snapshot, it does not need etcd either. With --identity it needs no
KMS: the private keys decrypt the recovery copies of a provider of kind age.

It asks for confirmation, and records the user in the audit log, which must be configured (or named
with --audit-file). One value is printed unchanged; with --prefix, or with --output json, each is a
JSON object on a line, its value in base64.`,
		Args: command.OneArg("KEY"),
	}
	path, out := command.ConfigFlag(cmd), command.OutputFlag(cmd)
	var o decryptOptions
	cmd.Flags().BoolVar(&o.prefix, "prefix", false, "every key that begins with KEY")
	cmd.Flags().StringVar(&o.snapshot, "snapshot", "", "read the snapshot `FILE` of etcdctl snapshot save, or the database file of a stopped member, instead of etcd")
	cmd.Flags().StringVar(&o.file, "output-file", "", "write to a new `FILE`, mode 0600, instead of standard output")
	cmd.Flags().StringVar(&o.audit, "audit-file", "", "if the configuration has no audit log, record next to `FILE`, as commands do next to the log of a proxy: in NAME.commands.jsonl for NAME.jsonl")
	yes := cmd.Flags().Bool("yes", false, "do not ask for confirmation")
	wait, identities := timeoutFlag(cmd), identityFlag(cmd)
	cmd.RunE = command.RunUntilSignal(func(cmd *cobra.Command, args []string) error {
		c, err := command.LoadConfig(cmd, *path, command.Checks(nil))
		if err != nil {
			return err
		}
		if c.Audit == nil && o.audit == "" {
			return command.Usage("add an audit block to the configuration, or name a file with --audit-file", "decrypting values is always recorded, and there is no audit log")
		}
		if o.audit != "" {
			c.Audit = &config.Audit{Path: o.audit, MaxSizeMiB: 100, MaxFiles: 10}
		}
		c.Audit.Required = true
		o.identities = *identities
		o.key, o.json = args[0], *out == "json" || o.prefix
		what := fmt.Sprintf("the value of %q", o.key)
		if o.prefix {
			what = fmt.Sprintf("the values of all keys that begin with %q", o.key)
		}
		if err := command.Confirm(cmd, *yes, "Decrypt "+what+"? It is recorded in "+command.AuditPath(c.Audit.Path)+"."); err != nil {
			return err
		}
		cl, err := openCluster(cmd, c, clusterOptions{inspectOnly: true, identities: *identities, wait: *wait, noEtcd: o.snapshot != ""})
		if err != nil {
			return err
		}
		defer cl.close()
		return cl.decrypt(cmd.Context(), o, cmd.OutOrStdout(), cmd.ErrOrStderr())
	})
	return cmd
}

type decryptOptions struct {
	key, snapshot, file, audit string
	prefix, json               bool
	identities                 []string
}

// decryptedValue is one line of output.
type decryptedValue struct {
	Key      string `json:"key"`
	KeyBytes []byte `json:"keyBytes,omitempty"` // Key where that is not valid UTF-8
	Revision int64  `json:"revision"`
	State    string `json:"state"`
	Value    []byte `json:"value,omitempty"`
	Error    string `json:"error,omitempty"`
}

// decrypt decrypts and prints values.
func (cl *cluster) decrypt(ctx context.Context, o decryptOptions, stdout, stderr io.Writer) (err error) {
	begun := auditlog.Record{Command: "decrypt", Key: o.key, Outcome: "begun", Reason: command.WithIdentity("from "+cmp.Or(o.snapshot, "etcd"), o.identities)}
	if err := command.Record(cl.config, stderr, begun); err != nil {
		return err
	}
	found, left, foreign := false, 0, 0
	ended := auditlog.Record{Command: "decrypt", Key: o.key} // with the number of decrypted values
	defer func() { err = errors.Join(err, command.Record(cl.config, stderr, ended.Ended(err))) }()
	if o.file != "" {
		f, ferr := os.OpenFile(o.file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if ferr != nil {
			return fmt.Errorf("--output-file: %w", ferr)
		}
		defer func() {
			err = errors.Join(err, f.Close())
			if err != nil && (!o.json || !found) { // it would prevent the next attempt
				err = errors.Join(err, os.Remove(o.file))
			}
		}()
		stdout = f
	}
	err = cl.values(ctx, o, func(kv *mvccpb.KeyValue) error {
		found = true
		v := decryptedValue{Key: string(kv.Key), KeyBytes: inventory.KeyBytes(string(kv.Key)), Revision: kv.ModRevision, State: "unruled", Value: kv.Value}
		var ierr error
		rule := cl.rules.Of(kv.Key)
		if rule != nil {
			var state keyring.ValueState
			v.Value, state, ierr = rule.Sealer.Inspect(ctx, kv.Key, kv.Value)
			if e, ok := errors.AsType[*keyring.Error](ierr); ok && (e.Kind == keyring.Unavailable || e.Responded()) {
				state = inventory.Unavailable
			}
			v.State = string(state)
		}
		// Values that the proxy returns as they are stored were not decrypted.
		switch {
		case v.State == string(keyring.Foreign):
			ierr, foreign = errors.New("it is encrypted by a provider that its rule does not read"), foreign+1
		case rule != nil && rule.Strict && v.State == string(keyring.Unencrypted):
			ierr, foreign = errors.New("it is plaintext, which its rule refuses to read (allowPlaintextReads: false): it was written to etcd directly"), foreign+1
		case rule == nil && strings.HasPrefix(string(kv.Value), envelope.Root):
			ierr, foreign = errors.New("it is encrypted, and no rule covers its key"), foreign+1
		}
		if ierr == nil {
			ended.Keys++
		} else {
			left++
			v.Value, v.Error = nil, ierr.Error()
		}
		return v.print(stdout, stderr, o.json)
	})
	switch {
	case err != nil:
		return err
	case !found:
		return problem.New("keys are written as etcd stores them, /registry/secrets/NAMESPACE/NAME for a Secret", "there is no key %q", o.key)
	case left > foreign && !o.json:
		return problem.New("status --list says why", "the value cannot be decrypted")
	case left > 0:
		return command.ErrFindings
	}
	return nil
}

// print writes one value. Bytes that could control a terminal are not written to one.
func (v *decryptedValue) print(stdout, stderr io.Writer, asJSON bool) error {
	if asJSON {
		return json.NewEncoder(printable.JSON(stdout)).Encode(v)
	}
	if v.Error != "" {
		printable.Fprintf(stderr, "%s\n", v.Error)
		return nil
	}
	if f, ok := stdout.(*os.File); ok && term.IsTerminal(int(f.Fd())) && strings.ContainsFunc(string(v.Value), isControl) {
		return problem.New("write it to a file with --output-file, or use --output json", "the value is not text, and standard output is a terminal")
	}
	_, err := stdout.Write(v.Value)
	return err
}

func isControl(r rune) bool {
	return r == '\uFFFD' || !strconv.IsPrint(r) && r != '\n' && r != '\t' && r != '\r'
}

// values visits the stored values.
func (cl *cluster) values(ctx context.Context, o decryptOptions, visit func(*mvccpb.KeyValue) error) error {
	if o.snapshot != "" {
		return snapshotValues(ctx, o, visit)
	}
	if o.prefix {
		_, err := inventory.Scan(ctx, cl.etcd, []string{o.key}, 0, visit)
		return err
	}
	r, err := cl.etcd.Get(ctx, o.key)
	if err != nil {
		return err
	}
	for _, kv := range r.Kvs {
		if err := visit(kv); err != nil {
			return err
		}
	}
	return nil
}

// snapshotValues visits the values in a file.
func snapshotValues(ctx context.Context, o decryptOptions, visit func(*mvccpb.KeyValue) error) error {
	values, err := etcdfile.LiveValues(ctx, o.snapshot, func(key []byte) bool {
		return string(key) == o.key || o.prefix && strings.HasPrefix(string(key), o.key)
	})
	if err != nil {
		return fmt.Errorf("%s: %w", o.snapshot, err)
	}
	for _, v := range values {
		if err := visit(&mvccpb.KeyValue{Key: v.Key, Value: v.Value, ModRevision: v.Revision}); err != nil {
			return err
		}
	}
	return nil
}
