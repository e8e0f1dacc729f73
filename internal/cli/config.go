package cli

import (
	"errors"
	"io"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
)

func newConfig() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "config COMMAND",
		Short: "work with configuration files",
		Args:  cobra.NoArgs,
		RunE:  needsCommand,
	}
	cmd.AddCommand(newConfigCheck(), newConfigFromKubernetes())
	return cmd
}

// configReport is what config check --output json prints.
type configReport struct {
	File     string          `json:"file"`
	OK       bool            `json:"ok"`
	Problems []configProblem `json:"problems"`
	Warnings []configProblem `json:"warnings"` // of what may be meant; they do not make the file bad
}

type configProblem struct {
	Path string `json:"path"`
	Line int    `json:"line,omitempty"`
	Text string `json:"text"`
	Hint string `json:"hint,omitempty"`
}

// print writes it for people.
func (p configProblem) print(w io.Writer, kind, file string) {
	printf(w, "%s: %s: %s\n", kind, file, config.Problem(p))
	if p.Hint != "" {
		printf(w, "hint: %s\n", p.Hint)
	}
}

func newConfigCheck() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "check",
		Short: "report every problem of a configuration file",
		Long: `check reads a configuration file and every file that it names, and reports all problems at once, each with its path, its line and what to do.
It connects to nothing, and prints nothing about a file without problems and warnings.`,
		Args: cobra.NoArgs,
	}
	path, out := configFlag(cmd), outputFlag(cmd)
	cmd.RunE = fails(func(cmd *cobra.Command, _ []string) error {
		report := configReport{File: *path, OK: true, Problems: []configProblem{}, Warnings: []configProblem{}}
		_, err := config.LoadChecked(*path, backendChecks(func(p config.Problem) { report.Warnings = append(report.Warnings, configProblem(p)) }))
		ps, ok := errors.AsType[config.Problems](err)
		if err != nil && !ok {
			return unread(err)
		}
		for _, p := range ps {
			report.Problems = append(report.Problems, configProblem(p))
		}
		report.OK = len(report.Problems) == 0
		err = out.write(cmd.OutOrStdout(), report, func(io.Writer) {
			for _, p := range report.Problems {
				p.print(cmd.ErrOrStderr(), "error", *path)
			}
			for _, p := range report.Warnings {
				p.print(cmd.ErrOrStderr(), "warning", *path)
			}
		})
		if err == nil && !report.OK {
			return &failure{code: exitFindings}
		}
		return err
	})
	return cmd
}
