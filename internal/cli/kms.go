package cli

import (
	"errors"
	"io/fs"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/server"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/local"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/pluginserver"
)

var errNoKMS = problem.New("add one under kms", "no KMS is configured")

func newKMSNewLocalKey() *cobra.Command {
	return &cobra.Command{
		Use:   "new-local-key FILE",
		Short: "create a key file, or add a version to one",
		Long: `new-local-key creates a key file for a provider of kind local, readable by its owner only. If FILE
exists, it adds a version: a running proxy encrypts new values with it and decrypts existing ones
with the earlier versions, so keep these as long as values need them.

Anyone with the file can decrypt every value: keep it off the machines and backups that hold etcd's
data.`,
		Args: command.OneArg("FILE"),
		RunE: command.Run(func(_ *cobra.Command, args []string) error {
			err := local.NewKeyFile(args[0])
			if errors.Is(err, fs.ErrExist) {
				err = local.AddVersion(args[0])
			}
			if errors.Is(err, fs.ErrNotExist) {
				err = problem.WithHint(err, "create the folder first")
			}
			return err
		}),
	}
}

func newKMSServePlugin() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "serve-plugin --name PROVIDER --socket PATH",
		Short: "serve a provider as a Kubernetes KMS v2 plugin",
		Long: `serve-plugin serves a configured provider of any kind as a Kubernetes KMS v2 plugin on a unix
socket, for the API server's own encryption (--encryption-provider-config). An API server with a
provider of the same name and the proxy can read each other's values.

It uses the blocks kms, log and admin of the configuration, revokeWithin and sealUnreachableFor of
cache, and audit. It serves no metrics and health if the admin address is in use, for example by a
proxy with the same configuration. Its audit log is next to that of the proxy: for audit.jsonl it is
audit.plugin-PROVIDER.jsonl. It reloads key files and credential files, but not the configuration.

The socket's folder must exist. Only the user of this command can connect (mode 0600): that must be
the API server's user. A socket that no process serves is replaced; anything else at PATH is an
error.

SIGTERM or SIGINT removes the socket, finishes current calls, and exits with 0; calls that are
left after --drain-timeout are canceled. A second signal, half a second later or more, exits at
once, with code 3. Logs go to standard error. On Linux, core dumps of the process are turned off.`,
		Args: command.NoArgs,
	}
	path := command.ConfigFlag(cmd)
	var o server.PluginOptions
	var name string
	cmd.Flags().StringVar(&name, "name", "", "`PROVIDER` under kms to serve")
	cmd.Flags().StringVar(&o.Socket, "socket", "", "`PATH` of the socket, as /path or unix:///path")
	cmd.Flags().DurationVar(&o.Drain, "drain-timeout", pluginserver.DefaultDrainTimeout, "how long current calls may take after the first SIGTERM or SIGINT")
	cmd.RunE = command.Run(func(cmd *cobra.Command, _ []string) error {
		if err := command.Positive("--drain-timeout", o.Drain); err != nil {
			return err
		}
		switch {
		case name == "":
			return command.Usage("give the name of a provider under kms", "--name is missing")
		case o.Socket == "":
			return command.Usage("give a path, e.g. /run/kmsplugin/socket.sock", "--socket is missing")
		}
		// Only the one provider is made, by the server.
		c, err := command.LoadConfig(cmd, *path, config.Checks{Warn: func(p config.Problem) { o.Warnings = append(o.Warnings, p) }})
		if err != nil {
			return err
		}
		if o.Provider, err = findProvider(c, name); err != nil {
			return err
		}
		if err := server.CheckPlugin(o.Provider, o.Socket); err != nil {
			return &command.Error{Code: command.ExitUsage, Problem: problem.Of(err)[0]}
		}
		return server.ServePlugin(cmd.Context(), *path, c, cmd.ErrOrStderr(), o)
	})
	return cmd
}

func findProvider(c *config.Config, name string) (config.KMS, error) {
	names := make([]string, len(c.KMS))
	for i, k := range c.KMS {
		if k.Name == name {
			return k, nil
		}
		names[i] = k.Name
	}
	if len(names) == 0 {
		return config.KMS{}, errNoKMS
	}
	slices.Sort(names)
	return config.KMS{}, command.Usage("the configuration has "+strings.Join(names, ", "), "no KMS provider is called %q", name)
}
