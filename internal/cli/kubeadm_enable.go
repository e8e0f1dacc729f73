package cli

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/kubeadm"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/local"
)

// kubeadmEnable is the command kubeadm enable with its flags.
type kubeadmEnable struct {
	nodeFlags
	image, listen, admin                          string
	listenerCert, listenerKey, listenerClientCA   string
	kmsName, localKey, plugin                     string
	alibaba                                       kubeadm.Alibaba
	createKey, secretsOnly, decryptOnly, weakened bool
	dryRun                                        bool
}

func newKubeadmEnable() *cobra.Command {
	var e kubeadmEnable
	cmd := &cobra.Command{
		Use:   "enable --image IMAGE (--local-key FILE | --plugin URL | ...)",
		Short: "put the proxy between the API server of this node and etcd",
		Long: `enable makes the API server of a kubeadm control-plane node use the proxy:

  1. it writes the proxy's configuration, /etc/etcd-kms-proxy/config.yaml, from the flags and from
     the API server's own flags,
  2. it writes the proxy's static Pod into /etc/kubernetes/manifests, and waits until the proxy is
     ready,
  3. it changes --etcd-servers in kube-apiserver.yaml, one line, and waits until the API server is
     ready and uses the proxy.

If the proxy or the API server is not ready within --timeout, or on an interrupt, it restores all
files and waits until the API server is ready without the proxy. Backups of the files are in
/etc/etcd-kms-proxy/backup. It refuses a manifest that does not have the form that kubeadm writes.
If you run it again, it changes only what is different: a newer --image, for example, or rules that
encrypt after --decrypt-only.

On a cluster with several control-plane nodes, first run it with --decrypt-only on every node, and
then without it on every node: an API server without the proxy cannot read values that the others
encrypt.

The Pod runs as root, without capabilities, because only root can read the keys in
/etc/kubernetes/pki.`,
		Args: command.NoArgs,
	}
	f := cmd.Flags()
	e.add(cmd, "", 5*time.Minute)
	f.Lookup("config").Usage = "use configuration `FILE` unchanged, instead of flags for the KMS"
	f.StringVar(&e.image, "image", "", "container image of the proxy, `IMAGE`")
	f.BoolVar(&e.dryRun, "dry-run", false, "print what would change as a diff, and change nothing")
	f.BoolVar(&e.secretsOnly, "secrets-only", false, "send only Secrets through the proxy (--etcd-servers-overrides)")
	f.BoolVar(&e.decryptOnly, "decrypt-only", false, "store new values as plaintext, and decrypt encrypted values on reads")
	f.BoolVar(&e.weakened, "allow-weakening", false, "let the proxy start with rules that protect less than the previous ones")
	f.StringVar(&e.kmsName, "kms-name", "main", "`NAME` of the KMS provider, which becomes part of every encrypted value")
	f.StringVar(&e.localKey, "local-key", "", "key `FILE`, the same on all nodes")
	f.BoolVar(&e.createKey, "create-key", false, "create the file of --local-key if it does not exist; on the first node only")
	f.StringVar(&e.plugin, "plugin", "", "socket of a KMS v2 plugin, unix:///path")
	f.StringVar(&e.alibaba.Region, "alibaba-region", "", "region of a key of Alibaba Cloud KMS")
	f.StringVar(&e.alibaba.KeyID, "alibaba-key", "", "`ID`, alias or ARN of the key")
	f.StringVar(&e.alibaba.Endpoint, "alibaba-endpoint", "", "endpoint of the KMS, if it is not the region's public one")
	f.StringVar(&e.alibaba.Credentials.Type, "alibaba-credentials", "ecsRAMRole", "accessKey or ecsRAMRole; others need --config")
	f.StringVar(&e.alibaba.Credentials.RoleName, "alibaba-role", "", "role of the instance, for ecsRAMRole")
	f.StringVar(&e.alibaba.Credentials.AccessKeyIDFile, "alibaba-access-key-id-file", "", "`FILE` with the ID of the access key")
	f.StringVar(&e.alibaba.Credentials.AccessKeySecretFile, "alibaba-access-key-secret-file", "", "`FILE` with its secret")
	f.StringVar(&e.listen, "listen", defaultKubeadmListen, "address of the proxy's listener, which the API server connects to")
	f.StringVar(&e.admin, "admin", defaultKubeadmAdmin, "address of the proxy's metrics and health endpoints")
	f.StringVar(&e.listenerCert, "listener-cert", "/etc/kubernetes/pki/etcd/server.crt", "`FILE` with the proxy's server certificate")
	f.StringVar(&e.listenerKey, "listener-key", "/etc/kubernetes/pki/etcd/server.key", "`FILE` with its key")
	f.StringVar(&e.listenerClientCA, "listener-client-ca", "", "`FILE` with the CA of the API server's client certificate; by default that of --etcd-cafile")
	cmd.RunE = command.RunUntilSignal(e.run)
	return cmd
}

func (e *kubeadmEnable) run(cmd *cobra.Command, _ []string) error {
	kms, err := e.kms()
	if err != nil {
		return err
	}
	n, err := e.node(cmd.ErrOrStderr())
	if err != nil {
		return err
	}
	n.Settings = kubeadm.Settings{
		Listen: e.listen, Admin: e.admin, ListenerCert: e.listenerCert, ListenerKey: e.listenerKey, ListenerClientCA: e.listenerClientCA,
		KMS: kms, DecryptOnly: e.decryptOnly,
	}
	n.Image, n.OwnConfig, n.SecretsOnly, n.AllowWeakening = e.image, e.config != "", e.secretsOnly, e.weakened
	newKey := false
	if e.localKey != "" {
		if newKey, err = e.keyMissing(); err != nil {
			return err
		}
	}
	if newKey {
		n.Check = kubeadmFacts(config.Checks{KMSFilesMayMiss: true}) // which has the key file only
	}
	plan, err := n.Enable(cmd.Context())
	if err != nil {
		return err
	}
	if e.dryRun {
		if newKey {
			printable.Fprintf(cmd.OutOrStdout(), "a new key would be created: %s\n", kms.Local.KeyFile)
		}
		printPlan(cmd.OutOrStdout(), plan)
		return nil
	}
	if plan.Empty() {
		printable.Fprintf(cmd.OutOrStdout(), "the proxy is already enabled; nothing was changed\n")
		return nil
	}
	if newKey {
		if err := os.MkdirAll(filepath.Dir(kms.Local.KeyFile), 0o700); err != nil {
			return err
		}
		if err := local.NewKeyFile(kms.Local.KeyFile); err != nil {
			return err
		}
		printable.Fprintf(cmd.ErrOrStderr(), "created the key %s\n", kms.Local.KeyFile)
	}
	if err := n.Apply(cmd.Context(), plan); err != nil {
		return err
	}
	printable.Fprintf(cmd.OutOrStdout(), "the API server of this node uses the proxy\n")
	return nil
}

// kms returns the provider that the flags describe.
func (e *kubeadmEnable) kms() (kubeadm.KMS, error) {
	k := kubeadm.KMS{Name: e.kmsName}
	usage := func(hint, format string, args ...any) (kubeadm.KMS, error) {
		return k, command.Usage(hint, format, args...)
	}
	if e.image == "" {
		return usage("set --image to the proxy's image, which the container runtime of this node must have or be able to pull", "--image is missing")
	}
	var given []string
	for _, f := range []struct{ flag, value string }{{"--config", e.config}, {"--local-key", e.localKey}, {"--plugin", e.plugin}, {"--alibaba-key", e.alibaba.KeyID}} {
		if f.value != "" {
			given = append(given, f.flag)
		}
	}
	const one = "give one of --local-key, --plugin, --alibaba-region with --alibaba-key, and --config"
	switch {
	case len(given) == 0:
		return usage(one, "no flag names a KMS")
	case len(given) > 1:
		return usage(one, "%s cannot be used together", strings.Join(given, " and "))
	case e.config != "" && e.decryptOnly:
		return usage("set writeWith: plaintext and readWith in the file", "--decrypt-only has no effect with --config")
	case e.createKey && e.localKey == "":
		return usage("add --local-key with the path of the file", "--create-key needs --local-key")
	}
	if text, hint := config.CheckProviderName(e.kmsName); text != "" {
		return usage(hint, "--kms-name: %s", text)
	}
	switch {
	case e.localKey != "":
		path, err := filepath.Abs(e.localKey)
		if err != nil {
			return k, err
		}
		k.Local = &kubeadm.Local{KeyFile: path}
	case e.plugin != "":
		k.Plugin = &kubeadm.Plugin{Endpoint: e.plugin}
	case e.alibaba.KeyID != "":
		if e.alibaba.Region == "" {
			return usage("set it to the region of the key", "--alibaba-region is missing")
		}
		switch c := e.alibaba.Credentials; c.Type {
		case "ecsRAMRole":
		case "accessKey":
			if c.AccessKeyIDFile == "" || c.AccessKeySecretFile == "" {
				return usage("set them to the files that hold the access key", "--alibaba-access-key-id-file and --alibaba-access-key-secret-file are needed")
			}
		default:
			return usage("write a configuration of your own, and use --config", "--alibaba-credentials %s is not accessKey or ecsRAMRole", c.Type)
		}
		k.Alibaba = &e.alibaba
	}
	return k, nil
}

// keyMissing reports whether a new key must be created.
func (e *kubeadmEnable) keyMissing() (bool, error) {
	_, err := os.Stat(e.localKey)
	switch {
	case err == nil:
		return false, nil
	case !errors.Is(err, fs.ErrNotExist):
		return false, err
	case !e.createKey:
		return false, problem.New("copy it from another node, with mode 0600; on the first node of the cluster, create it with --create-key", "the key file %s does not exist", e.localKey)
	}
	return true, nil
}
