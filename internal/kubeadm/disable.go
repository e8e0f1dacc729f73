package kubeadm

import (
	"context"
	"errors"
	"io/fs"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

// Disable returns the plan after which the API server uses etcd without the proxy. It changes
// nothing itself. The plan keeps the configuration and the keys. The caller must have checked that
// no value in etcd is encrypted.
func (n *Node) Disable() (*Plan, error) {
	m, err := n.manifest()
	if err != nil {
		return nil, err
	}
	facts, configErr := n.readConfig(m)
	p := &Plan{Mode: n.mode(m)}
	target := m
	switch p.Mode {
	case All:
		if errors.Is(configErr, fs.ErrNotExist) {
			configErr = problem.New("change --etcd-servers in "+n.APIServer+" by hand; "+n.Backups+" has backups", "%s", n.Config+", which has the addresses of etcd, does not exist")
		}
		if configErr != nil {
			return nil, configErr
		}
		target, err = m.WithEtcdServers(facts.Endpoints)
		if err != nil {
			return nil, err
		}
	case Secrets:
		if target, err = m.WithSecretsServers(nil); err != nil {
			return nil, err
		}
	case Off:
	}
	podChange, err := change(n.Pod, nil)
	if err != nil {
		return nil, err
	}
	p.add(step{
		change: Change{n.APIServer, m.Bytes(), target.Bytes()},
		what:   "writing " + n.APIServer + " and waiting for the API server",
		wait:   func(ctx context.Context) error { return n.waitWithoutProxy(ctx, target) },
		undo:   func(ctx context.Context) error { return n.waitThroughProxy(ctx, m) },
	})
	p.add(step{change: podChange, what: "removing " + n.Pod, wait: n.waitProxyStopped, undo: func(ctx context.Context) error { return n.waitProxyRestarted(ctx, nil) }})
	return p, nil
}
