package cli

import (
	"io"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/buildinfo"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
)

const versionFormat = "etcd-kms-proxy %s (%s, %s)\n"

func newVersion() *cobra.Command {
	cmd := &cobra.Command{Use: "version", Short: "print the version of this binary", Args: command.NoArgs}
	out := command.OutputFlag(cmd)
	cmd.RunE = command.Run(func(cmd *cobra.Command, _ []string) error {
		b := buildinfo.Read()
		return out.Write(cmd.OutOrStdout(), b, func(w io.Writer) {
			printable.Fprintf(w, versionFormat, b.Version, b.Go, b.Platform)
		})
	})
	return cmd
}
