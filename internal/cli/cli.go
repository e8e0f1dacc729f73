// Package cli is the command line of etcd-kms-proxy. It has one file for each command, with its
// flags and its reports as text and JSON. What the commands share is in package command, the
// commands that work on the values in etcd are in package stored, and the long-running commands are
// composed by package server.
package cli

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"google.golang.org/grpc/grpclog"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/buildinfo"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/stored"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/coredump"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

// Main runs the command line of the process and returns its exit code. release is the version that
// the linker was given, or "".
func Main(release string) int {
	buildinfo.SetRelease(release)
	// The libraries of gRPC and of its JSON gateway write to stderr past every logger, and quote
	// requests. So GRPC_GO_LOG_SEVERITY_LEVEL, GRPC_GO_LOG_VERBOSITY_LEVEL and ETCD_CLIENT_DEBUG in
	// the environment have no effect.
	grpclog.SetLoggerV2(grpclog.NewLoggerV2(io.Discard, io.Discard, io.Discard))
	if err := coredump.Forbid(); err != nil { // before anything secret is read
		printable.Fprintf(os.Stderr, "warning: core dumps of this process are not turned off, and could contain keys and values: %v\n", err)
	}
	return run(os.Args[1:], os.Stdout, os.Stderr)
}

// run executes a command line and returns its exit code.
func run(args []string, stdout, stderr io.Writer) int {
	root := newRoot()
	root.SetArgs(args)
	root.SetOut(stdout)
	root.SetErr(stderr)
	// cobra's own command accepts any word as a shell, and prints its help. It binds the output
	// when it is created.
	root.InitDefaultCompletionCmd("completion")
	if completion, _, err := root.Find([]string{"completion"}); err == nil {
		completion.Use, completion.Short = "completion COMMAND", "print a completion script for a shell"
		completion.Args, completion.RunE = cobra.NoArgs, command.NeedsCommand
	}
	documentExitCodes(root)
	cmd, err := root.ExecuteC()
	if err == nil {
		return 0
	}
	e, ok := errors.AsType[*command.Error](err)
	if _, unwritten := errors.AsType[*fs.PathError](err); !ok && unwritten {
		e, ok = command.Failure(err), true // of completion, which is cobra's
	}
	if !ok {
		// Any other error is cobra's, about the command line.
		e = command.Usage(command.UsageOf(cmd), "%w", err)
	}
	e.Print(stderr)
	return e.Code
}

func newRoot() *cobra.Command {
	root := command.Group("etcd-kms-proxy", "a transparent proxy in front of etcd that encrypts values with keys from a KMS",
		newServe(), stored.NewStatus(), stored.NewReencrypt(), stored.NewPurge(), stored.NewVerify(), stored.NewDecrypt(), stored.NewDrill(),
		command.Group("config", "work with configuration files", newConfigCheck(), newConfigFromKubernetes()),
		command.Group("kms", "work with the configured key management services", newKMSCheck(), newKMSNewLocalKey(), newKMSServePlugin()),
		command.Group("audit", "work with audit logs", newAuditVerify()),
		newHealthcheck(), newSetup(), newKubeadm(), newVersion())
	root.PersistentPreRunE = func(*cobra.Command, []string) error { return refuseEnvironment() }
	root.Long = `etcd-kms-proxy sits between etcd's clients and etcd. It encrypts the values of selected keys with a
key management service (KMS), in the format of Kubernetes' KMS v2, and passes everything else
unchanged.`
	root.SilenceErrors, root.SilenceUsage = true, true
	b := buildinfo.Read()
	root.Version = b.Version // so that cobra handles the flag
	root.SetVersionTemplate(printable.Sprintf(versionFormat, b.Version, b.Go, b.Platform))
	root.Flags().Bool("version", false, "print the version of this binary")
	// Groups have COMMAND in their use, so cobra's second line for them says nothing more.
	root.SetUsageTemplate(strings.NewReplacer("Flags.FlagUsages ", "Flags.FlagUsagesWrapped 100 ",
		"{{if .HasAvailableSubCommands}}\n  {{.CommandPath}} [command]{{end}}", "", "[command]", "COMMAND").Replace(root.UsageTemplate()))
	return root
}

// refuseEnvironment refuses variables of the environment that make a library print requests:
// GODEBUG=http2debug=1 and 2, with which Go's HTTP/2 packages print every header, tokens among
// them, and every frame. The Alibaba Cloud SDK's DEBUG=sdk is refused if that KMS is configured.
// The log of gRPC and etcd's client is discarded by [Main], and GRPC_BINARY_LOG_FILTER has no
// effect here.
func refuseEnvironment() error {
	// The packages look for these substrings, so "http2debug=10" is the first.
	for _, setting := range []string{"http2debug=1", "http2debug=2"} {
		if strings.Contains(os.Getenv("GODEBUG"), setting) {
			return command.Failure(problem.New("unset it", "the environment has GODEBUG=%s, which makes Go print tokens and values", setting))
		}
	}
	return nil
}
