package kubeadm

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

// Enable returns the plan after which the API server uses the proxy. It changes nothing itself.
func (n *Node) Enable(ctx context.Context) (*Plan, error) {
	m, err := n.manifest()
	if err != nil {
		return nil, err
	}
	p := &Plan{Mode: n.mode(m)}
	if err := n.checkEnable(m, p.Mode); err != nil {
		return nil, err
	}
	config, facts, err := n.configure(m, p.Mode)
	if err != nil {
		return nil, err
	}
	pod, err := (&podSettings{n.Image, n.Config, config, facts, n.AllowWeakening}).pod()
	if err != nil {
		return nil, err
	}
	configChange, err := change(n.Config, config)
	if err != nil {
		return nil, err
	}
	podChange, err := change(n.Pod, pod)
	if err != nil {
		return nil, err
	}
	if podChange.Old == nil {
		for _, l := range []struct{ flag, address string }{{"listen", n.Settings.Listen}, {"admin", n.Settings.Admin}} {
			if err := checkFree(l.flag, l.address); err != nil {
				return nil, err
			}
		}
	} else if !bytes.HasPrefix(podChange.Old, []byte(generatedHeader)) {
		return nil, problem.New("move it away", "%s", n.Pod+" was not written by this command")
	}
	before, _ := n.proxyMetrics(ctx) // nil if no proxy runs
	target := m
	switch {
	case p.Mode != Off: // the API server already uses the proxy
	case n.SecretsOnly:
		target, err = m.WithSecretsServers([]string{n.url()})
	default:
		target, err = m.WithEtcdServers([]string{n.url()})
	}
	if err != nil {
		return nil, err
	}
	p.add(step{change: configChange, what: "writing " + n.Config})
	podStep := step{change: podChange, what: "writing " + n.Pod + " and waiting for the proxy"}
	podStep.wait = func(ctx context.Context) error { return n.waitProxyRestarted(ctx, before) }
	if p.Mode != Off {
		podStep.wait = func(ctx context.Context) error {
			if err := n.waitProxyRestarted(ctx, before); err != nil {
				return err
			}
			return n.waitThroughProxy(ctx, m)
		}
		podStep.undo = func(ctx context.Context) error { return n.waitThroughProxy(ctx, m) }
	}
	if podChange.Old == nil {
		podStep.undo = n.waitProxyStopped
	}
	p.add(podStep)
	p.add(step{
		change: Change{n.APIServer, m.Bytes(), target.Bytes()},
		what:   "writing " + n.APIServer + " and waiting for the API server",
		wait:   func(ctx context.Context) error { return n.waitThroughProxy(ctx, target) },
		undo:   func(ctx context.Context) error { return n.waitWithoutProxy(ctx, m) },
	})
	return p, nil
}

// checkEnable refuses API servers that must not use the proxy.
func (n *Node) checkEnable(m *Manifest, mode Mode) error {
	if f := m.Flag("encryption-provider-config"); f != "" {
		return problem.New("migrate to the proxy as docs/guides/migrate-from-kubernetes.md describes; etcd-kms-proxy config from-kubernetes writes the configuration", "%s", "the API server encrypts values itself, with --encryption-provider-config="+f+": values would be encrypted twice")
	}
	switch {
	case mode == Off && m.SecretsServers() != nil:
		return problem.New("remove the override of /secrets first, or edit the manifest by hand, as docs/guides/kubernetes.md describes", "%s", "kube-apiserver's --"+flagOverrides+" sends Secrets to other servers: "+strings.Join(m.SecretsServers(), ", "))
	case mode == All && n.SecretsOnly, mode == Secrets && !n.SecretsOnly:
		return problem.New("run kubeadm disable first to change this, or use --secrets-only as it was used before", "the proxy is already enabled, for %s", map[Mode]string{All: "everything", Secrets: "Secrets only"}[mode])
	}
	for _, e := range m.EtcdServers() {
		if mode == Off && !strings.HasPrefix(e, "https://") {
			return unrecognized("has the etcd server %s, which is not https://", e)
		}
	}
	return nil
}

// configure returns the proxy's configuration and the facts in it.
func (n *Node) configure(m *Manifest, mode Mode) ([]byte, Facts, error) {
	if n.OwnConfig {
		return n.ownConfig(m, mode)
	}
	endpoints := m.EtcdServers()
	old, err := os.ReadFile(n.Config)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, Facts{}, err
	}
	// the manifest names the proxy, so only the configuration has the addresses of etcd
	if mode == All {
		current, err := n.Check(n.Config, nil)
		if err != nil {
			return nil, Facts{}, err
		}
		endpoints = current.Endpoints
	}
	config, err := n.Settings.configuration(m, endpoints)
	if err != nil {
		return nil, Facts{}, err
	}
	if old != nil && !bytes.Equal(old, config) {
		if err := n.checkReplaceConfig(m, old, endpoints); err != nil {
			return nil, Facts{}, err
		}
	}
	facts, err := n.Check(n.Config, config)
	return config, facts, err
}

// checkReplaceConfig refuses to replace a configuration that differs in more than --decrypt-only
// from what this command would write. So no change by the operator is lost, and no KMS.
func (n *Node) checkReplaceConfig(m *Manifest, old []byte, endpoints []string) error {
	other := n.Settings
	other.DecryptOnly = !other.DecryptOnly
	text, err := other.configuration(m, endpoints)
	if err != nil {
		return err
	}
	if !bytes.Equal(old, text) {
		return problem.New("use it as it is, with --config "+n.Config+" and without flags for the KMS, or move it away", "%s", n.Config+" already exists and differs from the flags")
	}
	if n.Settings.DecryptOnly && !n.AllowWeakening {
		return problem.New("add --allow-weakening if this is intended", "%s", n.Config+" encrypts new values; with --decrypt-only they would be stored as plaintext")
	}
	return nil
}

// ownConfig returns the operator's configuration, unchanged.
func (n *Node) ownConfig(m *Manifest, mode Mode) ([]byte, Facts, error) {
	facts, err := n.Check(n.Config, nil)
	if err != nil {
		return nil, facts, err
	}
	config, err := os.ReadFile(n.Config)
	if err != nil {
		return nil, facts, err
	}
	if !slices.Contains(facts.Listeners, n.Settings.Listen) {
		return nil, facts, problem.New("add one, or set --listen to the address of one", "%s", n.Config+" has no listener with TLS at "+n.Settings.Listen)
	}
	if facts.Admin != n.Settings.Admin {
		return nil, facts, problem.New("change it, or set --admin to its address", "admin.address in %s is %q, not %s", n.Config, facts.Admin, n.Settings.Admin)
	}
	if servers := m.EtcdServers(); mode != All && !slices.Equal(slices.Sorted(slices.Values(servers)), slices.Sorted(slices.Values(facts.Endpoints))) {
		return nil, facts, problem.New("write the API server's etcd servers into etcd.endpoints", "%s has %s for etcd.endpoints, but the API server uses %s", n.Config, strings.Join(facts.Endpoints, ", "), strings.Join(servers, ", "))
	}
	return config, facts, nil
}
