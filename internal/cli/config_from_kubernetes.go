package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/config/kubernetes"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/kubelegacy"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/provider"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/keyfile"
)

// fromKubernetes has the flags of config from-kubernetes.
type fromKubernetes struct {
	file, etcdPrefix, keyDir, output, writeWith string
}

func newConfigFromKubernetes() *cobra.Command {
	var f fromKubernetes
	cmd := &cobra.Command{
		Use:   "from-kubernetes FILE",
		Short: "convert kube-apiserver's EncryptionConfiguration",
		Long: `from-kubernetes reads the file of kube-apiserver's --encryption-provider-config and prints a
configuration of the proxy that can read the values of the API server, and encrypts the same
resources:

  kms (v2)                      becomes a plugin of the same name, which is part of every value
  aescbc, aesgcm, secretbox     become providers for reading only; their keys are written to files
                                in --key-dir, mode 0600
  identity                      becomes writeWith: plaintext if it is the first provider, and
                                allowPlaintextReads: true in any case

Resources become the prefixes under which the API server stores them; the more precise wildcard has
precedence, as in the API server. What cannot be converted exactly is a warning, and a comment in
the result. Listeners and etcd are placeholders.

If aescbc, aesgcm or secretbox is the first provider, the rule encrypts new values with a KMS
provider of the same resources, or with a placeholder that you must fill in: then the command exits
with 1. --write-with selects the provider. No file is overwritten.`,
		Args: command.OneArg("FILE"),
	}
	cmd.Flags().StringVar(&f.etcdPrefix, "etcd-prefix", "/registry", "the API server's --etcd-prefix")
	cmd.Flags().StringVar(&f.keyDir, "key-dir", "", "folder `DIR` for files with the keys of aescbc, aesgcm and secretbox")
	cmd.Flags().StringVar(&f.output, "output", "-", "write the configuration to `FILE`; - is standard output")
	cmd.Flags().StringVar(&f.writeWith, "write-with", "", "KMS provider `NAME` to encrypt with instead of aescbc, aesgcm and secretbox")
	cmd.RunE = command.Run(func(cmd *cobra.Command, args []string) error {
		f.file = args[0]
		return f.run(cmd.OutOrStdout(), cmd.ErrOrStderr())
	})
	return cmd
}

// maxEncryptionConfiguration is the largest file that is read, in bytes.
const maxEncryptionConfiguration = 4 << 20

func (f *fromKubernetes) run(stdout, stderr io.Writer) error {
	if f.writeWith != "" {
		if text, hint := config.CheckProviderName(f.writeWith); text != "" {
			return command.Usage(hint, "--write-with: %s", text)
		}
	}
	c, err := f.read(stderr)
	if err != nil {
		return err
	}
	dir, err := filepath.Abs(f.keyDir)
	if err != nil {
		return fmt.Errorf("folder for key files: %w", err)
	}
	result, err := c.Convert(kubernetes.Options{
		Source: f.file, EtcdPrefix: f.etcdPrefix, WriteWith: f.writeWith,
		KeyFile: func(provider string) string { return filepath.Join(dir, provider+".yaml") },
	})
	if err != nil {
		return err
	}
	if len(result.KeyFiles) > 0 && f.keyDir == "" {
		return command.Usage("name a folder that only the user of the proxy can read", "%s holds keys, and --key-dir is missing", f.file)
	}
	if err := f.write(result, stdout); err != nil {
		return err
	}
	for _, n := range result.Notes {
		printable.Fprintf(stderr, "warning: %s\n", n)
	}
	if result.Unfinished != "" {
		return command.Findings("replace REPLACE under kms by its backend; its name becomes part of every value, and --write-with selects another", "KMS provider %q, with which new values will be encrypted, is a placeholder", result.Unfinished)
	}
	return nil
}

// read reads the EncryptionConfiguration. It prints all problems but the last, which the error
// holds.
func (f *fromKubernetes) read(stderr io.Writer) (*kubernetes.Configuration, error) {
	in, err := os.Open(f.file)
	if err != nil {
		return nil, fmt.Errorf("read EncryptionConfiguration: %w", err)
	}
	defer in.Close()
	data, err := io.ReadAll(io.LimitReader(in, maxEncryptionConfiguration+1))
	defer clear(data)
	if err != nil {
		return nil, fmt.Errorf("read EncryptionConfiguration: %w", err)
	}
	if len(data) > maxEncryptionConfiguration {
		return nil, fmt.Errorf("read EncryptionConfiguration: %s is larger than %d MiB", f.file, maxEncryptionConfiguration>>20)
	}
	c, err := kubernetes.Read(data)
	if _, ok := errors.AsType[config.Problems](err); ok {
		return nil, command.FileError(stderr, f.file, err)
	}
	return c, err
}

// write creates the key files and then the configuration. On an error, it removes what it created.
func (f *fromKubernetes) write(result *kubernetes.Result, stdout io.Writer) (err error) {
	var created []string
	defer func() {
		if err == nil {
			return
		}
		for _, path := range created {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	create := func(path, text string) error {
		err := keyfile.Create(path, text)
		switch {
		case err == nil:
			created = append(created, path)
			return nil
		case errors.Is(err, fs.ErrExist):
			return problem.New("move it away, or choose another file", "%s exists, and is not overwritten", path)
		case errors.Is(err, fs.ErrNotExist):
			return problem.New("create the folder: mkdir -p -m 0700 "+filepath.Dir(path), "there is no folder %s", filepath.Dir(path))
		}
		if cause, ok := errors.AsType[*fs.PathError](err); ok { // it says which file
			return fmt.Errorf("write files: %w", cause)
		}
		return err
	}
	for _, k := range result.KeyFiles {
		var b strings.Builder
		fmt.Fprintf(&b, "# Keys of the API server's %s provider, to decrypt its values. Remove the file, and its provider, when no value needs them.\nkeys:\n", k.Kind)
		form := provider.KubernetesKeyFile(kubelegacy.Type(k.Kind))
		for _, key := range k.Keys {
			b.WriteString(form.Line(keyfile.Key{ID: key.Name, Secret: key.Secret}))
		}
		if err := create(k.Path, b.String()); err != nil {
			return err
		}
	}
	if f.output == "-" {
		if _, err := stdout.Write(result.Text); err != nil {
			return fmt.Errorf("write configuration: %w", err)
		}
		return nil
	}
	return create(f.output, string(result.Text))
}
