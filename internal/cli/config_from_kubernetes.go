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
	"github.com/etcd-kms-proxy/etcd-kms-proxy/kmsclient/keyfile"
)

// fromKubernetes is what the command line of config from-kubernetes says.
type fromKubernetes struct {
	file, etcdPrefix, keyDir, output, writeWith string
}

func newConfigFromKubernetes() *cobra.Command {
	var f fromKubernetes
	cmd := &cobra.Command{
		Use:   "from-kubernetes FILE",
		Short: "make a configuration of kube-apiserver's EncryptionConfiguration",
		Long: `from-kubernetes reads the file of kube-apiserver's --encryption-provider-config and prints a configuration of the proxy that reads what the API server has
stored, and seals where it encrypted:

  kms (v2)                      becomes a plugin of the same name, which stands in every value
  aescbc, aesgcm, secretbox     become providers for reading only; their keys go to files in --key-dir, mode 0600
  identity                      becomes writeWith: plaintext where it comes first, and allowPlaintextReads: true where it comes at all

Resources become the prefixes that the API server stores them below; of wildcards, the more precise one counts, as in the API server. What cannot be said exactly is a
warning, and a comment in the result. Listeners and etcd are placeholders.

Where aescbc, aesgcm or secretbox comes first, new values are sealed with a KMS provider of the same resources, or with a placeholder that must be filled in: then the
command exits with 1. --write-with chooses the provider. No file is ever overwritten.`,
		Args: cobra.ExactArgs(1),
	}
	cmd.Flags().StringVar(&f.etcdPrefix, "etcd-prefix", "/registry", "the API server's --etcd-prefix")
	cmd.Flags().StringVar(&f.keyDir, "key-dir", "", "folder `DIR` for files with the keys of aescbc, aesgcm and secretbox")
	cmd.Flags().StringVar(&f.output, "output", "-", "write the configuration to `FILE`; - is standard output")
	cmd.Flags().StringVar(&f.writeWith, "write-with", "", "KMS provider `NAME` to seal with in place of aescbc, aesgcm and secretbox")
	cmd.RunE = fails(func(cmd *cobra.Command, args []string) error {
		f.file = args[0]
		return f.run(cmd.OutOrStdout(), cmd.ErrOrStderr())
	})
	return cmd
}

// maxEncryptionConfiguration is far above what etcd's own limits let a cluster use.
const maxEncryptionConfiguration = 4 << 20

func (f *fromKubernetes) run(stdout, stderr io.Writer) error {
	if f.writeWith != "" {
		if text, hint := config.CheckProviderName(f.writeWith); text != "" {
			return &failure{code: exitUsage, err: fmt.Errorf("--write-with: %s", text), hint: hint}
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
		return &failure{code: exitUsage, err: fmt.Errorf("%s holds keys, and --key-dir is missing", f.file),
			hint: "name a folder that only the proxy's user may read: their files go there"}
	}
	if err := f.write(result, stdout); err != nil {
		return err
	}
	for _, n := range result.Notes {
		printf(stderr, "warning: %s\n", n)
	}
	if result.Unfinished != "" {
		return &failure{code: exitFindings, err: fmt.Errorf("KMS provider %q, which new values are to be sealed with, is a placeholder", result.Unfinished),
			hint: "put its backend in where it says REPLACE under kms; its name becomes part of every value, and --write-with chooses another"}
	}
	return nil
}

// read reads the EncryptionConfiguration. It prints all problems but the last, which the error holds.
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
	if ps, ok := errors.AsType[config.Problems](err); ok {
		failures := problemFailures(f.file, ps)
		for _, one := range failures[:len(failures)-1] {
			one.print(stderr)
		}
		return nil, failures[len(failures)-1]
	}
	return c, err
}

// write makes the key files and then the configuration. On an error, nothing of it is left.
func (f *fromKubernetes) write(result *kubernetes.Result, stdout io.Writer) (err error) {
	var made []string
	defer func() {
		if err == nil {
			return
		}
		for _, path := range made {
			err = errors.Join(err, os.Remove(path))
		}
	}()
	create := func(path, text string) error {
		err := keyfile.Create(path, text)
		switch {
		case err == nil:
			made = append(made, path)
			return nil
		case errors.Is(err, fs.ErrExist):
			return &failure{code: exitFailure, err: fmt.Errorf("%s is there already, and is not overwritten", path), hint: "move it away, or choose another place"}
		case errors.Is(err, fs.ErrNotExist):
			return &failure{code: exitFailure, err: fmt.Errorf("there is no folder %s", filepath.Dir(path)), hint: "make the folder: mkdir -p -m 0700 " + filepath.Dir(path)}
		}
		if cause, ok := errors.AsType[*fs.PathError](err); ok { // it says which file
			return fmt.Errorf("write files: %w", cause)
		}
		return err
	}
	for _, k := range result.KeyFiles {
		var b strings.Builder
		fmt.Fprintf(&b, "# Keys of the API server's %s provider, to read what it sealed. Remove the file, and its provider, when nothing is left that they open.\nkeys:\n", k.Kind)
		form := kubernetesForm(kubelegacy.Type(k.Kind))
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
