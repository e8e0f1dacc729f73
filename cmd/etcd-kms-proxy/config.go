package main

import (
	"errors"
	"fmt"
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
		Long: `check reads a configuration file and every file that it names, and reports all problems at once, each with its path, its line and what to do.
It connects to nothing. It says nothing of a file without a problem, and exits with 1 if there is one.`,
		Args: cobra.NoArgs,
	}
	path, out := configFlag(cmd), outputFlag(cmd)
	cmd.RunE = fails(func(cmd *cobra.Command, _ []string) error {
		_, err := config.LoadChecked(*path, backendChecks)
		ps, ok := errors.AsType[config.Problems](err)
		if err != nil && !ok {
			return &failure{code: exitFailure, err: err, hint: "name the file with --config"}
		}
		report := configReport{File: *path, OK: true, Problems: []configProblem{}}
		for _, p := range ps {
			report.Problems = append(report.Problems, configProblem(p))
		}
		report.OK = len(report.Problems) == 0
		err = out.write(cmd.OutOrStdout(), report, func(io.Writer) {
			for _, p := range report.Problems {
				where := *path + ": "
				if p.Line > 0 {
					where += fmt.Sprintf("line %d: ", p.Line)
				}
				if p.Path != "" {
					where += p.Path + ": "
				}
				(&failure{err: errors.New(where + p.Text), hint: p.Hint}).print(cmd.ErrOrStderr())
			}
		})
		if err == nil && !report.OK {
			return &failure{code: exitFindings}
		}
		return err
	})
	return cmd
}
