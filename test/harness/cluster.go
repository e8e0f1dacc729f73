package harness

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// Cluster is an etcd of several members, without TLS.
type Cluster struct {
	env     *Env
	Members []*Member
}

// Member is one of a [Cluster]. Its process may be ended and started again.
type Member struct {
	*Process
	env  *Env
	name string
	args []string
	// Address is host:port, URL the same with its scheme.
	Address, URL string
	DataDir      string
}

// StartCluster starts so many members of a fresh cluster, of the version of cfg, and waits until each of them answers. Of cfg, Version, Bare, Name and Flags count.
func (e *Env) StartCluster(members int, cfg EtcdConfig) *Cluster {
	e.TB.Helper()
	if cfg.Version == "" {
		cfg.Version = "3.7"
	}
	if cfg.Name == "" {
		cfg.Name = "etcd"
	}
	c := &Cluster{env: e}
	token := fmt.Sprintf("%016x", rand.Uint64())
	var peers, initial []string
	for n := range members {
		peers = append(peers, "http://"+FreeAddress(e.TB))
		initial = append(initial, fmt.Sprintf("%s-%d-%s=%s", cfg.Name, n, token, peers[n]))
	}
	for n := range members {
		m := &Member{env: e, name: fmt.Sprintf("%s-%d", cfg.Name, n), Address: FreeAddress(e.TB), DataDir: filepath.Join(e.Dir, fmt.Sprintf("%s-%d-%s", cfg.Name, n, token))}
		m.URL = "http://" + m.Address
		member, _, _ := strings.Cut(initial[n], "=")
		m.args = append([]string{
			"--name", member, "--data-dir", m.DataDir, "--log-level", "info", "--logger", "zap", "--unsafe-no-fsync", "--max-wals", "0",
			"--listen-peer-urls", peers[n], "--initial-advertise-peer-urls", peers[n], "--initial-cluster", strings.Join(initial, ","), "--initial-cluster-token", token,
			"--listen-client-urls", m.URL, "--advertise-client-urls", m.URL,
		}, cfg.Flags...)
		if !cfg.Bare {
			e.addDataDir(m.DataDir)
		}
		bin := Bin(e.TB, "etcd-"+cfg.Version)
		m.args = append([]string{bin}, m.args...)
		e.TB.Cleanup(func() { m.Stop(10 * time.Second) })
		m.Begin()
		c.Members = append(c.Members, m)
	}
	for _, m := range c.Members {
		m.WaitReady()
	}
	return c
}

// Begin is Start without the wait, where the member answers only once others do.
func (m *Member) Begin() { m.Process = m.env.spawn(m.name, m.args[0], m.args[1:]...) }

// Start starts the member again on its data, after [Process.Kill] or [Process.Stop], and waits until it answers.
func (m *Member) Start() {
	m.env.TB.Helper()
	m.Begin()
	m.WaitReady()
}

// WaitReady waits until the member answers for the cluster.
func (m *Member) WaitReady() {
	m.env.TB.Helper()
	conn := Dial(m.env.TB, m.Address, nil)
	defer conn.Close()
	Eventually(m.env.TB, 60*time.Second, m.name+" to answer", func() error {
		if err := m.Alive(); err != nil {
			return err
		}
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		_, err := pb.NewKVClient(conn).Range(ctx, &pb.RangeRequest{Key: []byte("\x00"), CountOnly: true})
		return err
	})
}

// URLs are the endpoints of all members.
func (c *Cluster) URLs() []string {
	var all []string
	for _, m := range c.Members {
		all = append(all, m.URL)
	}
	return all
}

// Leader waits for a leader, and returns it. It asks the members that run.
func (c *Cluster) Leader() *Member {
	c.env.TB.Helper()
	var leader *Member
	Eventually(c.env.TB, 30*time.Second, "a leader", func() error {
		for _, m := range c.Members {
			if m.Alive() != nil {
				continue
			}
			conn := Dial(c.env.TB, m.Address, nil)
			ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
			status, err := pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{})
			cancel()
			conn.Close()
			if err == nil && status.Leader == status.Header.MemberId {
				leader = m
				return nil
			}
		}
		return fmt.Errorf("no member leads")
	})
	return leader
}
