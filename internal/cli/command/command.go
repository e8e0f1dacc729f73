// Package command has what the commands of the command line share: exit codes, errors with hints,
// flags, reports as text and JSON, and the audit log of commands.
package command

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/provider"
)

// The exit codes, as --help lists them.
const (
	ExitFindings = 1 // a check found something
	ExitUsage    = 2 // the command line is wrong
	ExitFailure  = 3 // the command failed
)

// DefaultConfig is the default of --config.
const DefaultConfig = "/etc/etcd-kms-proxy/config.yaml"

// Error is an error with an exit code.
type Error struct {
	Code    int
	Problem problem.Problem
}

// ErrFindings exits with [ExitFindings]. The report on standard output has the findings.
var ErrFindings = &Error{Code: ExitFindings}

// Usage returns an error about the command line.
func Usage(hint, format string, args ...any) *Error {
	return &Error{ExitUsage, problem.New(hint, format, args...)}
}

// Findings returns an error with [ExitFindings], for what no report says.
func Findings(hint, format string, args ...any) *Error {
	return &Error{ExitFindings, problem.New(hint, format, args...)}
}

// Error implements error.
func (e *Error) Error() string { return e.Problem.String() }

// Unwrap returns the cause, or nil.
func (e *Error) Unwrap() error { return e.Problem.Err }

// Print writes the error and the hint, each as a line that begins with "error: " and "hint: ". It
// writes nothing for [ErrFindings].
func (e *Error) Print(w io.Writer) { PrintProblem(w, "error", e.Problem) }

// PrintProblem writes a problem as a line that begins with kind, and its hint. It writes nothing
// for the zero problem.
func PrintProblem(w io.Writer, kind string, p problem.Problem) {
	if p.Text == "" {
		return
	}
	text := strings.ReplaceAll(p.String(), "\n", "; ") // between joined errors
	printable.Fprintf(w, "%s: %s\n", kind, text)
	if p.Hint != "" {
		printable.Fprintf(w, "hint: %s\n", p.Hint)
	}
}

// Failure turns the error of a command into an [Error]. Problems without an exit code have
// [ExitFailure].
func Failure(err error) *Error {
	if e, ok := errors.AsType[*Error](err); ok {
		return e
	}
	if ps := problem.Of(err); len(ps) == 1 {
		return &Error{ExitFailure, ps[0]}
	}
	return &Error{ExitFailure, problem.Problem{Text: err.Error(), Err: err}}
}

// Run makes f the RunE of a command: every error that it returns is an [Error].
func Run(f func(cmd *cobra.Command, args []string) error) func(*cobra.Command, []string) error {
	return func(cmd *cobra.Command, args []string) error {
		if err := f(cmd, args); err != nil {
			return Failure(err)
		}
		return nil
	}
}

// Group returns a command that only groups others.
func Group(name, short string, commands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: name + " COMMAND", Short: short, Args: knownCommand, RunE: NeedsCommand, SuggestionsMinimumDistance: 2}
	cmd.AddCommand(commands...)
	return cmd
}

// knownCommand is the Args of a command that only groups others: an argument is a command that it
// does not have.
func knownCommand(cmd *cobra.Command, args []string) error {
	err := cobra.NoArgs(cmd, args)
	if err == nil {
		return nil
	}
	hint := UsageOf(cmd)
	if suggestions := cmd.SuggestionsFor(args[0]); len(suggestions) > 0 {
		hint = "did you mean " + strings.Join(suggestions, " or ") + "?"
	}
	return Usage(hint, "%w", err)
}

// NeedsCommand is the RunE of a command that only groups others.
func NeedsCommand(cmd *cobra.Command, _ []string) error {
	return Usage(cmd.CommandPath()+" --help lists them", "%s needs a command", cmd.CommandPath())
}

// NoArgs is the Args of a command that takes flags only.
func NoArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	hint := UsageOf(cmd)
	if ext := filepath.Ext(args[0]); ext == ".yaml" || ext == ".yml" {
		hint = "name the configuration with --config"
	}
	return Usage(hint, "unexpected argument %q: %s takes only flags", args[0], cmd.CommandPath())
}

// OneArg returns the Args of a command that takes one argument, which its usage calls name.
func OneArg(name string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) > 1 {
			return Usage(UsageOf(cmd), "%s takes one %s, and has %d arguments", cmd.CommandPath(), name, len(args))
		}
		return SomeArgs(name)(cmd, args)
	}
}

// SomeArgs returns the Args of a command that takes one or more arguments of a kind.
func SomeArgs(name string) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if len(args) == 0 {
			return Usage(UsageOf(cmd), "%s is missing", name)
		}
		return nil
	}
}

// UsageOf returns the hint for a command line that is wrong.
func UsageOf(cmd *cobra.Command) string {
	if cmd.HasAvailableSubCommands() {
		return cmd.CommandPath() + " --help lists the commands"
	}
	return "the command is " + cmd.UseLine() + "; --help explains it"
}

// ConfigFlag adds --config.
func ConfigFlag(cmd *cobra.Command) *string {
	return cmd.Flags().String("config", DefaultConfig, "configuration `FILE`")
}

// Positive returns a usage error if the duration of a flag is not positive.
func Positive(flag string, d time.Duration) error {
	if d <= 0 {
		return Usage("", "%s %v is not more than 0s", flag, d)
	}
	return nil
}

// Checks are the checks of a configuration beyond those of package config: of what is made from its
// parts, such as the mode of a key file. warn may be nil.
func Checks(warn func(config.Problem)) config.Checks {
	return config.Checks{KMS: provider.Check, Audit: checkAudit, Warn: warn}
}

// checkAudit checks the key of an audit log. It opens no log, which a proxy may be writing.
func checkAudit(a config.Audit) []config.Problem {
	if a.KeyFile == "" {
		return nil
	}
	_, err := auditlog.LoadKey(a.KeyFile)
	return problem.Of(err).In("keyFile", "head -c 32 /dev/urandom makes a key")
}

// LoadConfig reads the configuration with the given checks. It prints all problems but the last,
// which is the error.
func LoadConfig(cmd *cobra.Command, path string, checks config.Checks) (*config.Config, error) {
	c, err := config.LoadChecked(path, checks)
	if err == nil {
		return c, nil
	}
	return nil, FileError(cmd.ErrOrStderr(), path, err)
}

// FileError prints all problems of a file but the last, which it returns, each with the name of the
// file. Any other error is about reading the file.
func FileError(stderr io.Writer, path string, err error) error {
	ps, ok := errors.AsType[config.Problems](err)
	if !ok {
		return Unreadable(err)
	}
	ps = InFile(path, ps)
	for _, p := range ps[:len(ps)-1] {
		PrintProblem(stderr, "error", p)
	}
	return ps[len(ps)-1]
}

// InFile returns the problems with the name of the file before their texts.
func InFile(path string, ps config.Problems) config.Problems {
	named := make(config.Problems, len(ps))
	for i, p := range ps {
		named[i] = problem.Problem{Text: fmt.Sprintf("%s: %s", path, p.String()), Hint: p.Hint, Err: p.Err}
	}
	return named
}

// Unreadable adds a hint to the error of a configuration file that cannot be read.
func Unreadable(err error) error {
	if errors.Is(err, fs.ErrPermission) {
		return problem.WithHint(err, "run it as a user that may read the file and those that it names, as the proxy's user may")
	}
	return problem.WithHint(err, "name the file with --config; docs/reference/configuration.md has an example")
}
