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
	Problems []configProblem `json:"problems"`
	// of settings that may be meant; they do not make the file invalid
	Warnings []configProblem `json:"warnings"`
}

type configProblem struct {
	Path string `json:"path"`
	Line int    `json:"line,omitempty"`
	Text string `json:"text"`
	Hint string `json:"hint,omitempty"`
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
		var problems, warnings config.Problems
		_, err := config.LoadChecked(*path, command.Checks(func(p config.Problem) { warnings = append(warnings, p) }))
		if err != nil {
			var ok bool
			if problems, ok = errors.AsType[config.Problems](err); !ok {
				return command.Unreadable(err)
			}
		}
		report := configReport{File: *path, OK: len(problems) == 0, Problems: reported(problems), Warnings: reported(warnings)}
		err = out.Write(cmd.OutOrStdout(), report, func(io.Writer) {
			for _, p := range command.InFile(*path, problems) {
				command.PrintProblem(cmd.ErrOrStderr(), "error", p)
			}
			for _, p := range command.InFile(*path, warnings) {
				command.PrintProblem(cmd.ErrOrStderr(), "warning", p)
			}
		})
		if err == nil && !report.OK {
			return command.ErrFindings
		}
		return err
	})
	return cmd
}

// reported returns problems as a report has them.
func reported(ps config.Problems) []configProblem {
	all := []configProblem{}
	for _, p := range ps {
		all = append(all, configProblem{Path: p.Path, Line: p.Line, Text: p.Text, Hint: p.Hint})
	}
	return all
}
