// Package cli is the command line of etcd-kms-proxy.
//
// It only composes: wiring.go turns the configuration into the packages' own types and is the one place that knows the
// backends; each subcommand has a file of its own.
package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/grpclog"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
)

const defaultConfig = "/etc/etcd-kms-proxy/config.yaml"

// Main runs the command line of the process and returns its exit code. release is the version that
// the linker was given, or "".
func Main(release string) int {
	version = release
	// The libraries of gRPC and of its JSON gateway write to stderr past every logger, and quote
	// what a client has sent. So GRPC_GO_LOG_SEVERITY_LEVEL, GRPC_GO_LOG_VERBOSITY_LEVEL and
	// ETCD_CLIENT_DEBUG in the environment have no effect.
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	if err := forbidDumps(); err != nil { // before anything is read that a dump could hold
		printf(os.Stderr, "warning: core dumps of this process are not turned off, and could hold keys and values: %v\n", err)
	}
	return run(os.Args[1:], os.Stdout, os.Stderr)
}

// run executes a command line and returns its exit code.
func run(args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	// cobra's own command takes any word for a shell, and succeeds with its help. It keeps the output of the moment.
	root.InitDefaultCompletionCmd("completion")
	if completion, _, err := root.Find([]string{"completion"}); err == nil {
		completion.Args, completion.RunE = cobra.NoArgs, needsCommand
	}
	documentExitCodes(root)
	cmd, err := root.ExecuteC()
	if err == nil {
		return 0
	}
	f, ok := errors.AsType[*failure](err)
	if _, unwritten := errors.AsType[*fs.PathError](err); !ok && unwritten {
		f, ok = &failure{code: exitFailure, err: err}, true // of completion, which is cobra's
	}
	if !ok {
		// What is not a command's own error is cobra's, about the command line.
		f = &failure{code: exitUsage, err: err, hint: usageOf(cmd)}
	}
	f.print(stderr)
	return f.code
}

// usageOf says what a command line may look like that cobra has refused.
func usageOf(cmd *cobra.Command) string {
	if cmd.HasAvailableSubCommands() {
		return cmd.CommandPath() + " --help lists the commands"
	}
	return "the command is " + cmd.UseLine() + "; --help says more"
}

func newRoot() *cobra.Command {
	root := &cobra.Command{
		PersistentPreRunE: func(*cobra.Command, []string) error { return refuseEnvironment() },

		Use:   "etcd-kms-proxy COMMAND",
		Short: "a transparent encrypting proxy before etcd, with keys from a KMS",
		Long: `etcd-kms-proxy sits between etcd's clients and etcd. It seals the values of chosen keys under a key management service (KMS), in the format
of Kubernetes' KMS v2, and passes everything else untouched.`,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          cobra.NoArgs,
		RunE:          needsCommand,
	}
	root.AddCommand(newServe(), newStatus(), newReencrypt(), newPurge(), newVerify(), newDecrypt(), newConfig(), newKMS(), newAudit(), newHealthcheck(), newSetup(), newKubeadm(), newVersion())
	return root
}

// needsCommand is the RunE of a command that only groups others.
func needsCommand(cmd *cobra.Command, _ []string) error {
	return &failure{code: exitUsage, err: fmt.Errorf("%s needs a command", cmd.CommandPath()), hint: cmd.CommandPath() + " --help lists them"}
}

// failure is an error with the exit code and, where there is one, what to do.
type failure struct {
	code int
	err  error // nil: the report on standard output has said it all
	hint string
}

func (f *failure) Error() string {
	if f.err == nil {
		return "findings"
	}
	return f.err.Error()
}

func (f *failure) Unwrap() error { return f.err }

// print writes "error: " and "hint: " lines.
func (f *failure) print(w io.Writer) {
	if f.err == nil {
		return
	}
	printf(w, "error: %v\n", f.err)
	if f.hint != "" {
		printf(w, "hint: %s\n", f.hint)
	}
}

// fails makes a command's function return a [*failure] for every error.
func fails(f func(cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		err := f(cmd, args)
		if err == nil {
			return nil
		}
		if _, ok := errors.AsType[*failure](err); ok {
			return err
		}
		if ps := problemsOf(err, "", ""); len(ps) == 1 && ps[0].Hint != "" { // it gives advice
			return &failure{code: exitFailure, err: errors.New(ps[0].Text), hint: ps[0].Hint}
		}
		return &failure{code: exitFailure, err: err}
	}
}

// configFlag adds --config.
func configFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("config", defaultConfig, "configuration `FILE`")
}

// loadConfig reads the configuration for a command that makes all of it. It prints all problems but the last, which the error holds.
func loadConfig(cmd *cobra.Command, path string) (*config.Config, error) {
	return loadChecked(cmd, path, backendChecks(nil))
}

// loadForEach is loadConfig for a command that makes each backend by itself, and says of each what is wrong with it.
func loadForEach(cmd *cobra.Command, path string, warn func(config.Problem)) (*config.Config, error) {
	return loadChecked(cmd, path, config.Checks{Warn: warn})
}

func loadChecked(cmd *cobra.Command, path string, checks config.Checks) (*config.Config, error) {
	c, err := config.LoadChecked(path, checks)
	if err == nil {
		return c, nil
	}
	ps, ok := errors.AsType[config.Problems](err)
	if !ok {
		return nil, unread(err)
	}
	fs := problemFailures(path, ps)
	for _, f := range fs[:len(fs)-1] {
		f.print(cmd.ErrOrStderr())
	}
	return nil, fs[len(fs)-1]
}

// unread is the failure of a configuration file that cannot be read.
func unread(err error) *failure {
	hint := "name the file with --config; docs/reference/configuration.md has an example"
	if errors.Is(err, fs.ErrPermission) {
		hint = "run it as a user that may read the file and those that it names, as the proxy's user may"
	}
	return &failure{code: exitFailure, err: err, hint: hint}
}

// problemFailures gives each problem the form "FILE: line 7: path: text".
func problemFailures(path string, ps config.Problems) []*failure {
	fs := make([]*failure, len(ps))
	for i, p := range ps {
		fs[i] = &failure{code: exitFailure, err: fmt.Errorf("%s: %s", path, p), hint: p.Hint}
	}
	return fs
}
