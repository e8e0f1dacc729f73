package harness

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// Cluster is an etcd with several members, without TLS.
type Cluster struct {
	env     *Env
	cfg     EtcdConfig
	token   string
	initial []string // name=peerURL of each member
	Members []*Member
	// Peers are the networks from the other members to each member, if the configuration requests
	// them.
	Peers []*Relay
}

// Member is a member of a [Cluster]. Its process may be stopped and started again.
type Member struct {
	*Process
	env  *Env
	name string
	args []string
	// Version is the version of etcd, one of [Versions]. It takes effect at the next start.
	Version string
	// Address is host:port, URL the same with its scheme.
	Address, URL string
	DataDir      string
	// Flags are appended to the command line at the next start.
	Flags []string
	// ID is set for members that were added to a running cluster.
	ID uint64
}

// StartCluster starts the members of a new cluster, of the version in cfg, and waits until each of
// them responds. It uses Version, Bare, Name, Relayed and Flags of cfg.
func (e *Env) StartCluster(members int, cfg EtcdConfig) *Cluster {
	e.TB.Helper()
	if cfg.Version == "" {
		cfg.Version = "3.7"
	}
	if cfg.Name == "" {
		cfg.Name = "etcd"
	}
	c := &Cluster{env: e}
	c.cfg, c.token = cfg, fmt.Sprintf("%016x", rand.Uint64())
	var listen, peers []string
	for n := range members {
		address := FreeAddress(e.TB)
		listen, peers = append(listen, "http://"+address), append(peers, "http://"+address)
		if cfg.Relayed {
			c.Peers = append(c.Peers, e.StartRelay(address))
			peers[n] = c.Peers[n].URL
		}
		c.initial = append(c.initial, fmt.Sprintf("%s-%d-%s=%s", cfg.Name, n, c.token, peers[n]))
	}
	for n, peer := range peers {
		c.begin(listen[n], peer, "new")
	}
	for _, m := range c.Members {
		m.WaitReady()
	}
	return c
}

// begin starts the next member, which listens for peers at one URL, and is advertised to them with
// another.
func (c *Cluster) begin(listen, peer, state string) *Member {
	e, n := c.env, len(c.Members)
	member, _, _ := strings.Cut(c.initial[n], "=")
	m := &Member{env: e, name: fmt.Sprintf("%s-%d", c.cfg.Name, n), Version: c.cfg.Version, Address: FreeAddress(e.TB), DataDir: filepath.Join(e.Dir, member)}
	m.URL = "http://" + m.Address
	m.args = append([]string{
		"--name", member, "--data-dir", m.DataDir, "--log-level", "info", "--logger", "zap", "--unsafe-no-fsync", "--max-wals", "0",
		"--listen-peer-urls", listen, "--initial-advertise-peer-urls", peer, "--initial-cluster", strings.Join(c.initial, ","), "--initial-cluster-token", c.token,
		stateFlag, state, "--listen-client-urls", m.URL, "--advertise-client-urls", m.URL,
	}, c.cfg.Flags...)
	if !c.cfg.Bare {
		e.addDataDir(m.DataDir)
	}
	e.TB.Cleanup(func() { m.Stop(10 * time.Second) })
	m.Begin()
	c.Members = append(c.Members, m)
	return m
}

// AddLearner adds a learner to the cluster and starts it. It may not have all data of the leader
// yet.
func (c *Cluster) AddLearner() *Member {
	c.env.TB.Helper()
	conn := Dial(c.env.TB, c.Members[0].Address, nil)
	defer conn.Close()
	peer := "http://" + FreeAddress(c.env.TB)
	var added *pb.MemberAddResponse
	Eventually(c.env.TB, 30*time.Second, "etcd to take a member: all have to be known as healthy for a while", func() (err error) {
		added, err = pb.NewClusterClient(conn).MemberAdd(c.env.TB.Context(), &pb.MemberAddRequest{PeerURLs: []string{peer}, IsLearner: true})
		return err
	})
	c.initial = append(c.initial, fmt.Sprintf("%s-%d-%s=%s", c.cfg.Name, len(c.Members), c.token, peer))
	m := c.begin(peer, peer, "existing")
	m.ID = added.Member.ID
	return m
}

const stateFlag = "--initial-cluster-state"

// Begin is Start without the wait, for a member that responds only when others do.
func (m *Member) Begin() {
	m.Process = m.env.spawn(m.name, Bin(m.env.TB, "etcd-"+m.Version), append(slices.Clone(m.args), m.Flags...)...)
}

// Start starts the member again on its data, after [Process.Kill] or [Process.Stop], and waits
// until it responds.
func (m *Member) Start() {
	m.env.TB.Helper()
	m.Begin()
	m.WaitReady()
}

// WaitReady waits until the member responds for the cluster.
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

// LoseMajority kills all members but the first, and waits until that one has no leader.
func (c *Cluster) LoseMajority() {
	c.env.TB.Helper()
	for _, m := range c.Members[1:] {
		m.Kill()
	}
	left := c.Members[0]
	conn := Dial(c.env.TB, left.Address, nil)
	defer conn.Close()
	Eventually(c.env.TB, 30*time.Second, left.name+" to miss its leader", func() error {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		status, err := pb.NewMaintenanceClient(conn).Status(ctx, &pb.StatusRequest{})
		if err == nil && status.Leader != 0 {
			err = fmt.Errorf("it follows %x", status.Leader)
		}
		return err
	})
}

// RegainMajority starts the members again that [Cluster.LoseMajority] killed, and waits until all
// respond.
func (c *Cluster) RegainMajority() {
	c.env.TB.Helper()
	for _, m := range c.Members[1:] {
		m.Begin()
	}
	for _, m := range c.Members {
		m.WaitReady()
	}
}

// Lose kills all members and removes their data.
func (c *Cluster) Lose() {
	c.env.TB.Helper()
	for _, m := range c.Members {
		m.Kill()
	}
	for _, m := range c.Members {
		if err := os.RemoveAll(m.DataDir); err != nil {
			c.env.TB.Fatal(err)
		}
	}
}

// URLs returns the endpoints of all members.
func (c *Cluster) URLs() []string {
	var all []string
	for _, m := range c.Members {
		all = append(all, m.URL)
	}
	return all
}

// Leader waits for a leader, and returns it. It asks the running members.
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
