package cli

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/kubeadm"
)

func newKubeadm() *cobra.Command {
	cmd := &cobra.Command{
		Use:   "kubeadm COMMAND",
		Short: "enable or disable the proxy on a kubeadm control-plane node",
		Long: `The kubeadm commands work on one control-plane node that kubeadm has set up. Run them there as root. docs/deploy/kubeadm.md describes clusters of
one and of three nodes.`,
		Args: cobra.NoArgs,
		RunE: needsCommand,
	}
	cmd.AddCommand(newKubeadmEnable(), newKubeadmDisable(), newKubeadmStatus())
	return cmd
}

// nodeFlags are the flags that all kubeadm commands have.
type nodeFlags struct {
	config, root string
	timeout      time.Duration
}

func (f *nodeFlags) add(cmd *cobra.Command, config string, timeout time.Duration) {
	cmd.Flags().StringVar(&f.config, "config", config, "configuration `FILE` of the proxy")
	cmd.Flags().StringVar(&f.root, "root", "", "first change the root to folder `DIR` (chroot), where a node's file system is mounted")
	cmd.Flags().DurationVar(&f.timeout, "timeout", timeout, "time limit of each wait for the proxy or the API server")
}

// node returns the node that the flags describe. Progress messages go to stderr.
func (f *nodeFlags) node(stderr io.Writer) (*kubeadm.Node, error) {
	if f.timeout <= 0 {
		return nil, &failure{code: exitUsage, err: fmt.Errorf("--timeout %v is not positive", f.timeout)}
	}
	if f.root != "" {
		if err := changeRoot(f.root); err != nil {
			return nil, &failure{code: exitFailure, err: fmt.Errorf("change the root to %s: %w", f.root, err), hint: "run the command as root"}
		}
	}
	n := &kubeadm.Node{
		Paths: kubeadm.DefaultPaths, Timeout: f.timeout,
		Settings: kubeadm.Settings{Listen: defaultKubeadmListen, Admin: defaultKubeadmAdmin},
		Check:    kubeadmFacts,
		Log:      func(format string, args ...any) { printf(stderr, format+"\n", args...) },
	}
	if f.config != "" {
		path, err := filepath.Abs(f.config)
		if err != nil {
			return nil, err
		}
		n.Config = path
	}
	return n, nil
}

const (
	defaultKubeadmListen = "127.0.0.1:12379"
	defaultKubeadmAdmin  = "127.0.0.1:9379"
)

// kubeadmFacts checks the configuration file at path and returns the facts that a node needs. The error
// lists all problems of the file.
func kubeadmFacts(path, name string) (kubeadm.Facts, error) {
	var facts kubeadm.Facts
	c, err := config.LoadChecked(path, backendChecks(nil))
	if ps, ok := errors.AsType[config.Problems](err); ok {
		var all []error
		for _, f := range problemFailures(name, ps) {
			all = append(all, f.err)
		}
		return facts, &failure{code: exitFailure, err: errors.Join(all...), hint: ps[len(ps)-1].Hint}
	}
	if err != nil {
		return facts, err
	}
	for _, l := range c.Listeners {
		if l.TLS != nil {
			facts.Listeners = append(facts.Listeners, l.Address)
		}
		if socket, ok := strings.CutPrefix(l.Address, "unix://"); ok {
			facts.WritableFolders = append(facts.WritableFolders, filepath.Dir(socket))
		}
	}
	if c.Admin != nil {
		facts.Admin = c.Admin.Address
	}
	if c.Audit != nil {
		facts.WritableFolders = append(facts.WritableFolders, filepath.Dir(c.Audit.Path))
	}
	facts.Endpoints = c.Etcd.Endpoints
	for _, k := range c.KMS {
		if k.Plugin == nil {
			continue
		}
		// An abstract socket needs no mount: the Pod uses the network namespace of the host.
		if socket := strings.TrimPrefix(k.Plugin.Endpoint, "unix://"); strings.HasPrefix(socket, "/") {
			facts.Folders = append(facts.Folders, filepath.Dir(socket))
		}
	}
	facts.Files = namedFiles(reflect.ValueOf(c))
	return facts, nil
}

// namedFiles returns the files that the configuration names.
func namedFiles(v reflect.Value) (files []string) {
	switch v.Kind() {
	case reflect.Pointer:
		if !v.IsNil() {
			files = namedFiles(v.Elem())
		}
	case reflect.Slice:
		for i := range v.Len() {
			files = append(files, namedFiles(v.Index(i))...)
		}
	case reflect.Struct:
		for i := range v.NumField() {
			if f := v.Field(i); v.Type().Field(i).Tag.Get("file") == "true" && f.Kind() == reflect.String {
				if f.String() != "" {
					files = append(files, f.String())
				}
			} else {
				files = append(files, namedFiles(f)...)
			}
		}
	}
	return files
}

// printPlan prints the changes of a dry run.
func printPlan(w io.Writer, p *kubeadm.Plan) {
	for line := range strings.Lines(p.Diff()) {
		printf(w, "%s\n", strings.TrimSuffix(line, "\n"))
	}
}

// notThere reports whether err is due to a missing file.
func notThere(err error) bool { return errors.Is(err, fs.ErrNotExist) }
