package kubeadm

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

// Paths are the files of a node. [DefaultPaths] are kubeadm's.
type Paths struct {
	APIServer string // manifest of kube-apiserver
	Pod       string // manifest of the proxy, in the same folder
	Config    string // configuration of the proxy
	// folder of backups; not that of the manifests, where kubelet starts every file
	Backups string
}

// DefaultPaths are those of a node that kubeadm has set up.
var DefaultPaths = Paths{
	APIServer: "/etc/kubernetes/manifests/kube-apiserver.yaml",
	Pod:       "/etc/kubernetes/manifests/etcd-kms-proxy.yaml",
	Config:    "/etc/etcd-kms-proxy/config.yaml",
	Backups:   "/etc/etcd-kms-proxy/backup",
}

// Facts are the parts of a checked configuration that this package uses.
type Facts struct {
	Listeners       []string // addresses of listeners with TLS
	Admin           string   // host:port, "" without admin
	Endpoints       []string // of etcd
	Files           []string // that the configuration names
	Folders         []string // of sockets
	WritableFolders []string // of logs
}

// Node is a control-plane node. It is for one goroutine.
type Node struct {
	Paths
	Settings Settings
	// Image is that of the proxy.
	Image string
	// OwnConfig uses the existing configuration file, and ignores most of Settings.
	OwnConfig bool
	// SecretsOnly sends only Secrets through the proxy.
	SecretsOnly bool
	// AllowWeakening lets the proxy start with rules that protect less than the previous ones.
	AllowWeakening bool
	// Timeout bounds each wait for the proxy or the API server.
	Timeout time.Duration
	// Check checks a configuration: text as the content of the file at path, or the file itself if
	// text is nil.
	Check func(path string, text []byte) (Facts, error)
	// Log is called before each step.
	Log func(format string, args ...any)
}

// Mode says which of the API server's requests go through the proxy.
type Mode string

// The modes.
const (
	Off     Mode = "off"     // nothing
	All     Mode = "all"     // everything
	Secrets Mode = "secrets" // Secrets only
)

func (n *Node) url() string { return "https://" + n.Settings.Listen }

// mode returns the mode of an API server with the manifest m.
func (n *Node) mode(m *Manifest) Mode {
	switch {
	case slices.Contains(m.EtcdServers(), n.url()):
		return All
	case slices.Contains(m.SecretsServers(), n.url()):
		return Secrets
	}
	return Off
}

// readConfig sets the addresses of the listener and of admin from the configuration, so that only
// enable needs flags for them.
func (n *Node) readConfig(m *Manifest) (Facts, error) {
	facts, err := n.Check(n.Config, nil)
	if err != nil {
		return facts, err
	}
	n.Settings.Admin = facts.Admin
	for _, l := range slices.Backward(facts.Listeners) {
		n.Settings.Listen = l
		if n.mode(m) != Off {
			break
		}
	}
	return facts, nil
}

func (n *Node) manifest() (*Manifest, error) {
	data, err := os.ReadFile(n.APIServer)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, problem.New("run the command on a control-plane node that kubeadm has set up, as root", "%s", n.APIServer+" does not exist")
	}
	if err != nil {
		return nil, err
	}
	return ParseManifest(data)
}

// Plan is an ordered list of changes. The manifest of the API server is the last one when the proxy
// is enabled, and the first one when it is disabled.
type Plan struct {
	Mode    Mode // before
	Changes []Change
	steps   []step
}

// Empty reports whether the plan changes nothing.
func (p *Plan) Empty() bool { return len(p.Changes) == 0 }

// Diff returns all changes as unified diffs.
func (p *Plan) Diff() string {
	var b strings.Builder
	for _, c := range p.Changes {
		b.WriteString(c.Diff())
	}
	return b.String()
}

// step is a change with the waits that follow it and its rollback. Both waits may be nil.
type step struct {
	change     Change
	what       string
	wait, undo func(context.Context) error
}

func (p *Plan) add(s step) {
	if !s.change.Empty() {
		p.Changes = append(p.Changes, s.change)
		p.steps = append(p.steps, s)
	}
}

// Apply makes the changes of a plan. If a change or the wait after it fails, or if ctx ends, it
// restores all files, waits for the API server, and returns a [problem.Problem] with the cause.
func (n *Node) Apply(ctx context.Context, p *Plan) error {
	if err := os.MkdirAll(filepath.Dir(n.Config), 0o700); err != nil {
		return err
	}
	if err := n.backUp(p); err != nil {
		return err
	}
	for i, s := range p.steps {
		n.Log("%s", s.what)
		err := s.change.write()
		if err == nil && s.wait != nil {
			err = s.wait(ctx)
		}
		if err == nil && ctx.Err() != nil {
			err = errors.New("interrupted")
		}
		if err != nil {
			return n.rollBack(ctx, p.steps[:i+1], err)
		}
	}
	return nil
}

const logs = "the logs are in /var/log/pods/kube-system_etcd-kms-proxy-*, /var/log/pods/kube-system_kube-apiserver-* and journalctl -u kubelet"

// rollBack reverts steps, the last one first.
func (n *Node) rollBack(ctx context.Context, steps []step, cause error) error {
	n.Log("rolling back: %v", cause)
	ctx = context.WithoutCancel(ctx)
	for _, s := range slices.Backward(steps) {
		n.Log("restoring %s", s.change.Path)
		err := s.change.restore()
		if err == nil && s.undo != nil {
			err = s.undo(ctx)
		}
		if err != nil {
			return problem.New("check "+s.change.Path+", whose backup is in "+n.Backups+"; "+logs, "%v; the rollback is not complete: %v", cause, err)
		}
	}
	return problem.New(logs, "%s", cause.Error()+"; all files are as they were before, and the API server is as it was")
}

// backUp copies the files that a plan changes into the folder of backups.
func (n *Node) backUp(p *Plan) error {
	now := time.Now().UTC().Format("20060102T150405.000Z")
	for _, c := range p.Changes {
		if c.Old == nil {
			continue
		}
		if err := os.MkdirAll(n.Backups, 0o700); err != nil {
			return err
		}
		base := filepath.Base(c.Path)
		path := filepath.Join(n.Backups, strings.TrimSuffix(base, ".yaml")+"-"+now+".yaml")
		if err := writeFile(path, c.Old); err != nil {
			return err
		}
		n.Log("backup of %s: %s", c.Path, path)
	}
	return nil
}

// checkFree refuses an address that is in use.
func checkFree(flag, address string) error {
	l, err := net.Listen("tcp", address)
	if err != nil {
		return problem.New("stop the process that uses the port, or choose another address", "--%s %s cannot be listened on: %v", flag, address, err)
	}
	return l.Close()
}
