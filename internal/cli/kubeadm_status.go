package cli

import (
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/kubeadm"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
)

func newKubeadmStatus() *cobra.Command {
	var f nodeFlags
	cmd := &cobra.Command{
		Use:   "status",
		Short: "show whether the API server of this control-plane node uses the proxy",
		Long: `status shows whether the API server of this node uses the proxy, for all resources or for Secrets
only, and whether both are ready. It changes nothing. For the values in etcd, run etcd-kms-proxy
status.`,
		Args: command.NoArgs,
	}
	f.add(cmd, kubeadm.DefaultPaths.Config, 10*time.Second)
	out := command.OutputFlag(cmd)
	cmd.RunE = command.Run(func(cmd *cobra.Command, _ []string) error {
		n, err := f.node(cmd.ErrOrStderr())
		if err != nil {
			return err
		}
		s, err := n.Status(cmd.Context())
		if err != nil {
			return err
		}
		return out.Report(cmd, s.OK, s, func(w io.Writer) { printNode(w, s) })
	})
	return cmd
}

// printNode prints the state of a node as text.
func printNode(w io.Writer, s *kubeadm.Status) {
	ready := func(h kubeadm.Health) string {
		if h.Ready {
			return "ready"
		}
		return "not ready"
	}
	through := map[kubeadm.Mode]string{kubeadm.Off: "nothing", kubeadm.All: "everything", kubeadm.Secrets: "Secrets only"}[s.Mode]
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	printable.Fprintf(t, "through the proxy\t%s\n", through)
	printable.Fprintf(t, "--etcd-servers\t%s\n", strings.Join(s.Servers, ","))
	printable.Fprintf(t, "API server\t%s\n", ready(s.APIServer))
	if s.Pod || s.Mode != kubeadm.Off {
		printable.Fprintf(t, "proxy\t%s, %s\n", ready(s.Proxy), printable.Count(s.Connections, "connection", "connections"))
	}
	_ = t.Flush()
	for _, p := range s.Problems {
		printable.Fprintf(w, "problem: %s\n", p)
	}
}
