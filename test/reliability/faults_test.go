package reliability

import (
	"context"
	"math/rand/v2"
	"syscall"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// fault is something that happens, and its end.
type fault struct {
	name string
	// begin makes it happen. The returned function repairs what does not repair itself.
	begin func(s *site) (heal func())
	// lasts is how long it lasts, at least and at most, in milliseconds; 0: 100 to 800.
	lasts [2]int
	// weight is how often it is chosen, compared with the others; 0: once.
	weight  int
	network bool
	// needs returns why the fault cannot be made here, or nothing.
	needs func(s *site) string
}

func (f fault) hold() {
	at := f.lasts
	if at[1] == 0 {
		at = [2]int{100, 800}
	}
	time.Sleep(time.Duration(at[0]+rand.IntN(at[1]-at[0])) * time.Millisecond) // at any moment of what happens meanwhile
}

var faults = []fault{
	{name: "a proxy killed", weight: 6, begin: func(s *site) func() { return killed(s.anyProxy()) }},
	{name: "both proxies killed", begin: func(s *site) func() {
		first, second := killed(s.proxies[0]), killed(s.proxies[1])
		return func() { first(); second() }
	}},
	{name: "a proxy crashed with a core dump requested", weight: 2, begin: func(s *site) func() {
		p := s.anyProxy()
		s.signal(p.Process, syscall.SIGQUIT) // a goroutine dump, and GOTRACEBACK=crash
		p.Wait(within)
		return p.Start
	}},
	{name: "a proxy stopped and started", weight: 2, begin: func(s *site) func() {
		p := s.anyProxy()
		if !p.Stop(within) {
			s.t.Error("a proxy does not end")
		}
		return p.Start
	}},
	{name: "a proxy frozen", weight: 2, lasts: [2]int{200, 2000}, begin: func(s *site) func() { return s.frozen(s.anyProxy().Process) }},
	{name: "a proxy's configuration reloaded", begin: func(s *site) func() {
		s.signal(s.anyProxy().Process, syscall.SIGHUP)
		return func() {}
	}},

	{name: "a member of etcd killed", weight: 4, begin: func(s *site) func() { return killed(s.anyMember()) }},
	{name: "the leader of etcd killed", weight: 2, begin: func(s *site) func() { return killed(s.cluster.Leader()) }},
	{name: "all members of etcd killed", begin: func(s *site) func() {
		for _, m := range s.cluster.Members {
			m.Kill()
		}
		return s.startMembers
	}},
	{name: "a member of etcd frozen", weight: 2, lasts: [2]int{200, 2000}, begin: func(s *site) func() { return s.frozen(s.anyMember().Process) }},
	// It may believe for a moment that it still leads.
	{name: "the leader of etcd frozen", weight: 2, lasts: [2]int{500, 2500}, begin: func(s *site) func() { return s.frozen(s.cluster.Leader().Process) }},
	{name: "the leader of etcd moved", weight: 2, begin: func(s *site) func() { s.moveLeader(); return func() {} }},
	{name: "etcd compacted and a member defragmented", begin: func(s *site) func() { s.compact(); return func() {} }},
	{name: "etcd out of quota", begin: outOfQuota},

	{name: "the KMS killed", weight: 4, lasts: [2]int{100, 4000}, begin: func(s *site) func() { s.plugin.Kill(); return s.plugin.Start }},
	{name: "the KMS frozen", lasts: [2]int{200, 4000}, begin: func(s *site) func() { return s.frozen(s.plugin.Process) }},
	{name: "the KMS key rotated", begin: func(s *site) func() { s.rotate(); return func() {} }},

	{name: "the network from clients to a proxy failed", network: true, weight: 2, begin: func(s *site) func() {
		return failed(s.clientLinks[rand.IntN(2)])
	}},
	{name: "the network from a proxy to a member failed", network: true, weight: 2, begin: func(s *site) func() {
		return failed(s.memberLinks[rand.IntN(2)][rand.IntN(3)])
	}},
	{name: "the network from a proxy to all members failed", network: true, begin: func(s *site) func() {
		return failed(s.memberLinks[rand.IntN(2)]...)
	}},
	{name: "the network from the members to a member failed", network: true, begin: func(s *site) func() {
		return failed(s.cluster.Peers[rand.IntN(3)])
	}},

	{name: "the disk of a member of etcd full", needs: disks, lasts: [2]int{500, 1500}, begin: func(s *site) func() { return s.fillMember() }},
	{name: "the disk of a proxy's audit log full", needs: disks, lasts: [2]int{500, 1500}, begin: func(s *site) func() { return s.fillAudit() }},
	{name: "both of these disks full", needs: disks, lasts: [2]int{500, 1500}, begin: func(s *site) func() {
		member, audit := s.fillMember(), s.fillAudit()
		return func() { audit(); member() }
	}},

	{name: "a proxy's clock an hour ahead", needs: clocks, weight: 2, lasts: [2]int{500, 3000}, begin: func(s *site) func() { return s.moveClock(time.Hour) }},
	{name: "a proxy's clock an hour behind", needs: clocks, weight: 2, lasts: [2]int{500, 3000}, begin: func(s *site) func() { return s.moveClock(-time.Hour) }},
}

// killed kills a process, which is started again afterwards.
func killed(p interface {
	Kill()
	Start()
}) func() {
	p.Kill()
	return p.Start
}

// frozen stops a process, like the migration of a virtual machine.
func (s *site) frozen(p *harness.Process) func() {
	s.signal(p, syscall.SIGSTOP)
	return func() { s.signal(p, syscall.SIGCONT) }
}

func (s *site) signal(p *harness.Process, number syscall.Signal) {
	s.t.Helper()
	if err := syscall.Kill(p.PID(), number); err != nil {
		s.t.Fatal(err)
	}
}

// failed makes networks reset, hold back everything, or hold back responses.
func failed(links ...*harness.Relay) func() {
	state := harness.Link(1 + rand.IntN(3))
	for _, r := range links {
		r.Set(state)
	}
	return func() {
		for _, r := range links {
			r.Set(harness.Whole)
		}
	}
}

func (s *site) anyProxy() *harness.Proxy   { return s.proxies[rand.IntN(len(s.proxies))] }
func (s *site) anyMember() *harness.Member { return s.cluster.Members[rand.IntN(3)] }

// startMembers starts the members that have ended.
func (s *site) startMembers() {
	s.t.Helper()
	for _, m := range s.cluster.Members {
		if m.Alive() != nil {
			m.Begin()
		}
	}
	for _, m := range s.cluster.Members {
		m.WaitReady()
	}
}

// maintain calls etcd's maintenance service at a member, or at the leader if it is nil.
func (s *site) maintain(m *harness.Member, call func(context.Context, pb.MaintenanceClient) error) error {
	s.t.Helper()
	if m == nil {
		m = s.cluster.Leader()
	}
	conn := harness.Dial(s.t, m.Address, nil)
	defer conn.Close()
	ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Second)
	defer cancel()
	return call(ctx, pb.NewMaintenanceClient(conn))
}

func (s *site) moveLeader() {
	leader := s.cluster.Leader()
	for _, m := range s.cluster.Members {
		if m == leader {
			continue
		}
		var id uint64
		if s.maintain(m, func(ctx context.Context, c pb.MaintenanceClient) error {
			r, err := c.Status(ctx, &pb.StatusRequest{})
			id = r.GetHeader().GetMemberId()
			return err
		}) != nil {
			continue
		}
		// It may have lost the leadership meanwhile.
		_ = s.maintain(leader, func(ctx context.Context, c pb.MaintenanceClient) error {
			_, err := c.MoveLeader(ctx, &pb.MoveLeaderRequest{TargetID: id})
			return err
		})
		return
	}
}

// compact removes the history that all watches have seen, and frees its space.
func (s *site) compact() {
	s.t.Helper()
	if revision := s.load.seen(); revision > 0 {
		conn := harness.Dial(s.t, s.cluster.Leader().Address, nil)
		defer conn.Close()
		ctx, cancel := context.WithTimeout(s.t.Context(), 10*time.Second)
		defer cancel()
		_, _ = pb.NewKVClient(conn).Compact(ctx, &pb.CompactionRequest{Revision: revision}) // it may be compacted already
	}
	if err := s.maintain(s.anyMember(), func(ctx context.Context, c pb.MaintenanceClient) error {
		_, err := c.Defragment(ctx, &pb.DefragmentRequest{})
		return err
	}); err != nil {
		s.t.Errorf("defragment a member: %v", err)
	}
}

// outOfQuota raises the alarm that makes etcd refuse all writes, as when its database is too large.
func outOfQuota(s *site) func() {
	alarm := func(action pb.AlarmRequest_AlarmAction) {
		s.t.Helper()
		harness.Eventually(s.t, within, "the alarm to be changed", func() error {
			return s.maintain(nil, func(ctx context.Context, c pb.MaintenanceClient) error {
				status, err := c.Status(ctx, &pb.StatusRequest{})
				if err == nil {
					_, err = c.Alarm(ctx, &pb.AlarmRequest{Action: action, MemberID: status.Header.MemberId, Alarm: pb.AlarmType_NOSPACE})
				}
				if err != nil || action == pb.AlarmRequest_ACTIVATE {
					return err
				}
				// Another member may have led when it was raised.
				list, err := c.Alarm(ctx, &pb.AlarmRequest{Action: pb.AlarmRequest_GET})
				for _, a := range list.GetAlarms() {
					if _, err := c.Alarm(ctx, &pb.AlarmRequest{Action: action, MemberID: a.MemberID, Alarm: a.Alarm}); err != nil {
						return err
					}
				}
				return err
			})
		})
	}
	alarm(pb.AlarmRequest_ACTIVATE)
	return func() { alarm(pb.AlarmRequest_DEACTIVATE) }
}
