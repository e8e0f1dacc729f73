package cli

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/stored"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/kubeadm"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

func newKubeadmDisable() *cobra.Command {
	var f nodeFlags
	cmd := &cobra.Command{
		Use:   "disable",
		Short: "make the API server of this node use etcd without the proxy",
		Long: `disable restores the API server's --etcd-servers from the proxy's configuration, waits until the API
server is ready without the proxy, and removes the proxy's static Pod. It keeps the configuration
and the keys. If the API server is not ready within --timeout, it restores the manifest.

It fails while etcd holds encrypted values, which the API server cannot read without the proxy, and
while a rule encrypts new values. To decrypt them, run enable with --decrypt-only --allow-weakening
on every node, then reencrypt, and then disable on every node. --force skips both checks.`,
		Args: command.NoArgs,
	}
	f.add(cmd, kubeadm.DefaultPaths.Config, 5*time.Minute)
	dryRun := cmd.Flags().Bool("dry-run", false, "print what would change as a diff, and change nothing")
	force := cmd.Flags().Bool("force", false, "disable even if values are encrypted: the API server will fail to read them")
	cmd.RunE = command.RunUntilSignal(func(cmd *cobra.Command, _ []string) error {
		n, err := f.node(cmd.ErrOrStderr())
		if err != nil {
			return err
		}
		plan, err := n.Disable()
		if err != nil {
			return err
		}
		if *dryRun {
			printPlan(cmd.OutOrStdout(), plan)
			return nil
		}
		if plan.Empty() {
			printable.Fprintf(cmd.OutOrStdout(), "the proxy is not enabled; nothing was changed\n")
			return nil
		}
		if plan.Mode != kubeadm.Off && !*force {
			if err := nothingEncrypted(cmd, n.Config); err != nil {
				return err
			}
		}
		if err := n.Apply(cmd.Context(), plan); err != nil {
			return err
		}
		printable.Fprintf(cmd.OutOrStdout(), "the API server of this node uses etcd without the proxy\n")
		return nil
	})
	return cmd
}

const hintDecrypt = "run kubeadm enable --decrypt-only --allow-weakening on every control-plane node, then reencrypt; docs/deploy/kubeadm.md describes the steps"

// nothingEncrypted returns a failure if etcd holds encrypted values or a rule encrypts new ones.
func nothingEncrypted(cmd *cobra.Command, path string) error {
	c, err := command.LoadConfig(cmd, path, command.Checks(nil))
	if err != nil {
		return err
	}
	for _, r := range c.Rules {
		if r.WriteWith != config.Plaintext {
			return problem.New(hintDecrypt, "the rule for %q encrypts new values, which the API server cannot read without the proxy", r.Prefix)
		}
	}
	n, prefix, err := stored.CountEncrypted(cmd, c)
	if err == nil && n > 0 {
		err = problem.New(hintDecrypt, "etcd holds %s under %q, which the API server cannot read without the proxy", printable.Count(n, "encrypted value", "encrypted values"), prefix)
	}
	return err
}
