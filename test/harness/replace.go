package harness

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
)

// Replace removes a member from the cluster and adds a new one in its place: as a learner, which is
// promoted when it has the data. The new member is empty and has another ID, and the addresses and
// the folder of the old one.
func (c *Cluster) Replace(n int) {
	e, old := c.env, c.Members[n]
	e.TB.Helper()
	conn := Dial(e.TB, c.Members[(n+1)%len(c.Members)].Address, nil)
	defer conn.Close()
	cluster := pb.NewClusterClient(conn)
	name, peer, _ := strings.Cut(c.initial[n], "=")
	// try repeats a change that etcd refuses while a member is not known as healthy.
	try := func(what string, change func(context.Context) error) {
		e.TB.Helper()
		Eventually(e.TB, 60*time.Second, what, func() error {
			ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
			defer cancel()
			return change(ctx)
		})
	}
	// present returns the ID of the member that has the peer URL, or 0.
	present := func(ctx context.Context) (uint64, error) {
		list, err := cluster.MemberList(ctx, &pb.MemberListRequest{})
		for _, m := range list.GetMembers() {
			if slices.Contains(m.PeerURLs, peer) {
				return m.ID, nil
			}
		}
		return 0, err
	}
	try("etcd to remove "+old.name, func(ctx context.Context) error {
		id, err := present(ctx)
		if err != nil || id == 0 {
			return err
		}
		if _, err := cluster.MemberRemove(ctx, &pb.MemberRemoveRequest{ID: id}); err != nil {
			return err
		}
		return errors.New("it may still be there")
	})
	old.Stop(10 * time.Second) // it may have ended by itself
	old.empty()
	try("etcd to add "+old.name, func(ctx context.Context) error {
		id, err := present(ctx)
		if err == nil && id == 0 {
			_, err = cluster.MemberAdd(ctx, &pb.MemberAddRequest{PeerURLs: []string{peer}, IsLearner: true})
		}
		return err
	})
	old.args[slices.Index(old.args, stateFlag)+1] = "existing"
	old.Begin()
	try(name+" to be promoted: it needs the data of the leader", func(ctx context.Context) (err error) {
		if old.ID, err = present(ctx); err != nil {
			return err
		}
		list, err := cluster.MemberList(ctx, &pb.MemberListRequest{})
		for _, m := range list.GetMembers() {
			if m.ID == old.ID && !m.IsLearner {
				return nil
			}
		}
		if err == nil {
			_, err = cluster.MemberPromote(ctx, &pb.MemberPromoteRequest{ID: old.ID})
		}
		return err
	})
	old.WaitReady()
}

// empty removes a member's data. It keeps the folder, on which a file system may be mounted.
func (m *Member) empty() {
	m.env.TB.Helper()
	entries, err := os.ReadDir(m.DataDir)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	for _, entry := range entries {
		err = errors.Join(err, os.RemoveAll(filepath.Join(m.DataDir, entry.Name())))
	}
	if err != nil {
		m.env.TB.Fatalf("remove the data of %s: %v", m.name, err)
	}
}

// Snapshot saves the database of a member to a file in the temporary folder, with etcdctl 3.7, and
// returns its path.
func (c *Cluster) Snapshot(n int, name string) string {
	c.env.TB.Helper()
	path := filepath.Join(c.env.Dir, name)
	cmd := exec.Command(Bin(c.env.TB, "etcdctl-3.7"), "--endpoints", c.Members[n].URL, "snapshot", "save", path)
	if out, err := cmd.CombinedOutput(); err != nil {
		c.env.TB.Fatalf("save a snapshot: %v\n%s", err, out)
	}
	return path
}

// Restore stops the members that run, replaces their data with a snapshot, with etcdutl 3.7, and
// starts them.
func (c *Cluster) Restore(snapshot string) {
	e := c.env
	e.TB.Helper()
	for _, m := range c.Members {
		if m.Alive() == nil {
			m.Stop(10 * time.Second)
		}
	}
	for n, m := range c.Members {
		m.empty()
		name, peer, _ := strings.Cut(c.initial[n], "=")
		restored := m.DataDir + "-restored"
		cmd := exec.Command(Bin(e.TB, "etcdutl-3.7"), "snapshot", "restore", snapshot, "--name", name, "--data-dir", restored,
			"--initial-cluster", strings.Join(c.initial, ","), "--initial-cluster-token", c.token, "--initial-advertise-peer-urls", peer)
		if out, err := cmd.CombinedOutput(); err != nil {
			e.TB.Fatalf("restore a snapshot: %v\n%s", err, out)
		}
		err := os.CopyFS(m.DataDir, os.DirFS(restored))
		if err = errors.Join(err, os.RemoveAll(restored)); err != nil {
			e.TB.Fatalf("move the restored data of %s: %v", m.name, err)
		}
		m.Begin()
	}
	for _, m := range c.Members {
		m.WaitReady()
	}
}

// Downgrade prepares the cluster for the previous version: afterwards its members can be restarted
// with that version, one after the other.
func (c *Cluster) Downgrade(version string) {
	e := c.env
	e.TB.Helper()
	Eventually(e.TB, 60*time.Second, "etcd to permit "+version, func() error {
		leader := c.Leader()
		conn := Dial(e.TB, leader.Address, nil)
		defer conn.Close()
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		maintenance := pb.NewMaintenanceClient(conn)
		status, err := maintenance.Status(ctx, &pb.StatusRequest{})
		if err != nil {
			return err
		}
		if !status.GetDowngradeInfo().GetEnabled() {
			_, err := maintenance.Downgrade(ctx, &pb.DowngradeRequest{Action: pb.DowngradeRequest_ENABLE, Version: version})
			return errors.Join(err, errors.New("it was requested"))
		}
		for _, m := range c.Members {
			own := Dial(e.TB, m.Address, nil)
			defer own.Close()
			status, err := pb.NewMaintenanceClient(own).Status(ctx, &pb.StatusRequest{})
			if err != nil {
				return err
			}
			if !strings.HasPrefix(status.GetStorageVersion(), version+".") {
				return fmt.Errorf("%s stores as version %s", m.name, status.GetStorageVersion())
			}
		}
		return nil
	})
}
