package kubeadm

import (
	"context"
	"errors"
	"io/fs"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/problem"
)

// Disable returns what is to be changed so that the API server uses etcd without the proxy. It
// changes nothing. The configuration and the keys stay. The caller has made sure that no value in etcd
// is encrypted.
func (n *Node) Disable() (*Plan, error) {
	m, err := n.manifest()
	if err != nil {
		return nil, err
	}
	facts, unread := n.adopt(m)
	p := &Plan{Mode: n.mode(m)}
	past := m
	switch p.Mode {
	case All:
		if errors.Is(unread, fs.ErrNotExist) {
			unread = problem.New("change --etcd-servers in "+n.APIServer+" by hand; "+n.Backups+" has earlier versions", "%s", n.Config+", which says where etcd is, is not there")
		}
		if unread != nil {
			return nil, unread
		}
		past, err = m.WithEtcdServers(facts.Endpoints)
		if err != nil {
			return nil, err
		}
	case Secrets:
		if past, err = m.WithSecretsServers(nil); err != nil {
			return nil, err
		}
	case Off:
	}
	podChange, err := change(n.Pod, nil)
	if err != nil {
		return nil, err
	}
	p.add(step{
		change: Change{n.APIServer, m.Bytes(), past.Bytes()},
		what:   "writing " + n.APIServer + " and waiting for the API server",
		wait:   func(ctx context.Context) error { return n.past(ctx, past) },
		back:   func(ctx context.Context) error { return n.through(ctx, m) },
	})
	p.add(step{change: podChange, what: "removing " + n.Pod, wait: n.gone, back: func(ctx context.Context) error { return n.restarted(ctx, nil) }})
	return p, nil
}
