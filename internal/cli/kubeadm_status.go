package cli

import (
	"io"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/kubeadm"
)

func newKubeadmStatus() *cobra.Command {
	var f nodeFlags
	cmd := &cobra.Command{
		Use:   "status",
		Short: "show whether the API server of this control-plane node uses the proxy",
		Long: `status shows whether the API server of this node uses the proxy, for all resources or for Secrets only, and whether both are ready. It changes nothing. For
the values in etcd, run etcd-kms-proxy status.`,
		Args: cobra.NoArgs,
	}
	f.add(cmd, kubeadm.DefaultPaths.Config, 10*time.Second)
	out := outputFlag(cmd)
	cmd.RunE = fails(func(cmd *cobra.Command, _ []string) error {
		n, err := f.node(cmd.ErrOrStderr())
		if err != nil {
			return err
		}
		s, err := n.Status(cmd.Context())
		if err != nil {
			return err
		}
		if err := out.write(cmd.OutOrStdout(), s, func(w io.Writer) { printNode(w, s) }); err != nil {
			return err
		}
		if !s.OK {
			return &failure{code: exitFindings}
		}
		return nil
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
	printf(t, "through the proxy\t%s\n", through)
	printf(t, "--etcd-servers\t%s\n", strings.Join(s.Servers, ","))
	printf(t, "API server\t%s\n", ready(s.APIServer))
	if s.Pod || s.Mode != kubeadm.Off {
		printf(t, "proxy\t%s, %d connections\n", ready(s.Proxy), s.Connections)
	}
	_ = t.Flush()
	for _, p := range s.Problems {
		printf(w, "problem: %s\n", p)
	}
}
