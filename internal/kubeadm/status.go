package kubeadm

import (
	"context"
	"os"
)

// Status is the state of a node.
type Status struct {
	OK        bool     `json:"ok"`
	Mode      Mode     `json:"mode"`
	Manifest  string   `json:"manifest"`    // path of kube-apiserver's
	Servers   []string `json:"etcdServers"` // of its --etcd-servers
	Pod       bool     `json:"pod"`         // whether the proxy's static Pod exists
	Config    bool     `json:"config"`      // whether its configuration exists
	Proxy     Health   `json:"proxy"`
	APIServer Health   `json:"apiServer"`
	// Connections is the number of clients' connections to the proxy.
	Connections int      `json:"connections"`
	Problems    []string `json:"problems"`
}

// Health says whether a component is ready, and if not, why.
type Health struct {
	Ready  bool   `json:"ready"`
	Detail string `json:"detail,omitempty"`
}

func health(err error) Health {
	if err != nil {
		return Health{Detail: err.Error()}
	}
	return Health{Ready: true}
}

// Status returns the state of the node. It changes nothing.
func (n *Node) Status(ctx context.Context) (*Status, error) {
	m, err := n.manifest()
	if err != nil {
		return nil, err
	}
	_, configErr := n.readConfig(m)
	s := &Status{Mode: n.mode(m), Manifest: n.APIServer, Servers: m.EtcdServers(), Pod: exists(n.Pod), Config: exists(n.Config), Problems: []string{}}
	ctx, cancel := context.WithTimeout(ctx, n.Timeout)
	defer cancel()
	s.APIServer = health(n.apiReady(ctx, m))
	s.Proxy = health(n.proxyReady(ctx))
	if f, err := n.proxyMetrics(ctx); err == nil {
		s.Connections = f.connections
	}
	on := s.Mode != Off
	for _, c := range []struct {
		bad  bool
		text string
	}{
		{on && configErr != nil, errorText(configErr)},
		{!s.APIServer.Ready, "the API server is not ready: " + s.APIServer.Detail},
		{on && !s.Pod, "the API server is configured to use the proxy, but " + n.Pod + " does not exist: run kubeadm enable again, or kubeadm disable"},
		{!on && s.Pod, n.Pod + " exists, but the API server does not use the proxy: run kubeadm enable again, or kubeadm disable"},
		{(on || s.Pod) && !s.Proxy.Ready, "the proxy is not ready: " + s.Proxy.Detail},
		{on && s.Proxy.Ready && s.Connections == 0, "no client is connected to the proxy"},
	} {
		if c.bad {
			s.Problems = append(s.Problems, c.text)
		}
	}
	s.OK = len(s.Problems) == 0
	return s, nil
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
