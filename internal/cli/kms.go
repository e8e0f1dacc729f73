package cli

import (
	"errors"
	"io/fs"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/local"
)

func newKMS() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "kms COMMAND",
		Short: "work with the configured key management services",
		Args:  cobra.NoArgs,
		RunE:  needsCommand,
	}
	cmd.AddCommand(newKMSCheck(), newKMSNewLocalKey(), newKMSServePlugin())
	return cmd
}

func newKMSNewLocalKey() *cobra.Command {
	return &cobra.Command{
		Use:   "new-local-key FILE",
		Short: "make a key file, or add a version to one",
		Long: `new-local-key makes a key file for a provider of kind local, readable by its owner only. If FILE is there already, it adds a version: a running
proxy seals new values with it and opens old ones with the earlier versions, so none of these may be removed while values need it.

Whoever has the file can open every value: keep it off the machines and backups that hold etcd's data.`,
		Args: cobra.ExactArgs(1),
		RunE: fails(func(_ *cobra.Command, args []string) error {
			err := local.NewKeyFile(args[0])
			if errors.Is(err, fs.ErrExist) {
				err = local.AddVersion(args[0])
			}
			return err
		}),
	}
}
