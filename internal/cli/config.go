package cli

import (
	"errors"
	"io"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
)

// configReport is what config check --output json prints.
type configReport struct {
	File     string          `json:"file"`
	OK       bool            `json:"ok"`
	Problems config.Problems `json:"problems"`
	// of settings that may be meant; they do not make the file invalid
	Warnings config.Problems `json:"warnings"`
}

func newConfigCheck() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check",
		Short: "report every problem of a configuration file",
		Long: `check reads a configuration file and every file that it names, and reports all problems at once,
each with its path, its line and a hint. It connects to nothing, and prints nothing about a file
without problems and warnings.`,
		Args: command.NoArgs,
	}
	path, out := command.ConfigFlag(cmd), command.OutputFlag(cmd)
	cmd.RunE = command.Run(func(cmd *cobra.Command, _ []string) error {
		report := configReport{File: *path, Problems: config.Problems{}, Warnings: config.Problems{}}
		_, err := config.LoadChecked(*path, command.Checks(func(p config.Problem) { report.Warnings = append(report.Warnings, p) }))
		if err != nil {
			var ok bool
			if report.Problems, ok = errors.AsType[config.Problems](err); !ok {
				return command.Unreadable(err)
			}
		}
		report.OK = err == nil
		return out.Report(cmd, report.OK, report, func(io.Writer) {
			for _, p := range command.InFile(*path, report.Problems) {
				command.PrintProblem(cmd.ErrOrStderr(), "error", p)
			}
			for _, p := range command.InFile(*path, report.Warnings) {
				command.PrintProblem(cmd.ErrOrStderr(), "warning", p)
			}
		})
	})
	return cmd
}
