package cli

import (
	"errors"
	"io"
	"path/filepath"
	"reflect"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/cli/command"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/kubeadm"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/printable"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

func newKubeadm() *cobra.Command {
	cmd := command.Group("kubeadm", "enable or disable the proxy on a kubeadm control-plane node",
		newKubeadmEnable(), newKubeadmDisable(), newKubeadmStatus())
	cmd.Long = `The kubeadm commands work on one control-plane node that kubeadm has set up. Run them there as root.
docs/deploy/kubeadm.md describes clusters of one and of three nodes.`
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
	if err := command.Positive("--timeout", f.timeout); err != nil {
		return nil, err
	}
	if f.root != "" {
		if err := changeRoot(f.root); err != nil {
			return nil, problem.New("run the command as root", "change the root to %s: %w", f.root, err)
		}
	}
	n := &kubeadm.Node{
		Paths: kubeadm.DefaultPaths, Timeout: f.timeout,
		Settings: kubeadm.Settings{Listen: defaultKubeadmListen, Admin: defaultKubeadmAdmin},
		Check:    kubeadmFacts(command.Checks(nil)),
		Log:      func(format string, args ...any) { printable.Fprintf(stderr, format+"\n", args...) },
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

// kubeadmFacts returns the function that checks a configuration with the given checks and returns
// the facts that a node needs.
func kubeadmFacts(checks config.Checks) func(path string, text []byte) (kubeadm.Facts, error) {
	return func(path string, text []byte) (kubeadm.Facts, error) {
		var c *config.Config
		var err error
		if text != nil {
			c, err = config.Parse(path, text, checks)
		} else {
			c, err = config.LoadChecked(path, checks)
		}
		if ps, ok := errors.AsType[config.Problems](err); ok {
			texts := make([]string, len(ps))
			for i, p := range command.InFile(path, ps) {
				texts[i] = p.Text
			}
			err = problem.New(ps[len(ps)-1].Hint, "%s", strings.Join(texts, "\n"))
		}
		if err != nil {
			return kubeadm.Facts{}, err
		}
		return factsOf(c), nil
	}
}

// factsOf returns the facts of a configuration.
func factsOf(c *config.Config) kubeadm.Facts {
	facts := kubeadm.Facts{Endpoints: c.Etcd.Endpoints, Files: namedFiles(reflect.ValueOf(c))}
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
	for _, k := range c.KMS {
		if k.Plugin == nil {
			continue
		}
		// An abstract socket needs no mount: the Pod uses the network namespace of the host.
		if socket := strings.TrimPrefix(k.Plugin.Endpoint, "unix://"); strings.HasPrefix(socket, "/") {
			facts.Folders = append(facts.Folders, filepath.Dir(socket))
		}
	}
	return facts
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
		printable.Fprintf(w, "%s\n", strings.TrimSuffix(line, "\n"))
	}
}
