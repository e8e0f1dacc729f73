// Package purge removes old plaintext from etcd's history and database files. [ReadHistory] finds
// it, and [History.Remove] compacts the history, waits until each member has carried that out, and
// defragments the members one after the other.
package purge

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// History is what etcd still holds of values that were replaced or deleted.
type History struct {
	Compacted int64 `json:"compacted"` // revision of the last compaction; 0 if there was none
	Present   int64 `json:"present"`   // the last revision that was searched
	Plaintext int64 `json:"plaintext"` // old values under rules that encrypt, which are readable or may be
	// CompactAt is the lowest revision whose compaction removes all of them; 0 if there are none.
	CompactAt int64 `json:"compactAt"`

	readable func(*mvccpb.KeyValue) bool
}

// progressEvery is the interval of progress requests for a watch.
const progressEvery = 200 * time.Millisecond

// ReadHistory searches the history between the last compaction and the current revision for
// plaintext. It assumes that every current value is encrypted: see [inventory.Survey]. readable is
// called with each old value under a rule that encrypts, and reports whether to count it; it must
// not keep its argument. The error is [ErrOldEtcd] for a version of etcd whose watches may miss
// events.
func ReadHistory(ctx context.Context, c *clientv3.Client, rules *inventory.Rules, readable func(old *mvccpb.KeyValue) bool) (History, error) {
	if err := watchesAreWhole(ctx, c); err != nil {
		return History{}, err
	}
	now, err := c.Get(ctx, "\x00", clientv3.WithLimit(1), clientv3.WithKeysOnly())
	if err != nil {
		return History{}, fmt.Errorf("read the present revision: %w", err)
	}
	h := History{Present: now.Header.Revision, readable: readable}
	for _, p := range rules.SealingPrefixes() {
		if err := h.read(ctx, c, rules, p); err != nil {
			return h, fmt.Errorf("read the history of the keys below %q: %w", p, err)
		}
	}
	return h, nil
}

// read reads the events of one prefix. An old value is the previous value of an event, even if it
// was written before the compaction.
func (h *History) read(ctx context.Context, c *clientv3.Client, rules *inventory.Rules, prefix string) error {
	ctx, stop := context.WithCancel(clientv3.WithRequireLeader(ctx))
	defer stop()
	// etcd reports no progress for a watch that starts after the current revision.
	for from := h.Compacted + 1; from <= h.Present; from = h.Compacted + 1 {
		events := c.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithPrevKV(), clientv3.WithFragment(), clientv3.WithRev(from))
		again, err := h.follow(ctx, c, rules, events)
		if err != nil || !again {
			return err
		}
	}
	return nil
}

// follow reads a watch up to the current revision. again reports that the start of the watch was
// compacted.
func (h *History) follow(ctx context.Context, c *clientv3.Client, rules *inventory.Rules, events clientv3.WatchChan) (again bool, err error) {
	tick := time.NewTicker(progressEvery)
	defer tick.Stop()
	for {
		select {
		case <-tick.C:
			if err := c.RequestProgress(ctx); err != nil {
				return false, err
			}
		case r, ok := <-events:
			switch {
			case !ok:
				return false, cmp.Or(ctx.Err(), errors.New("the watch ended"))
			case r.CompactRevision > h.Compacted:
				h.Compacted = r.CompactRevision
				return true, nil
			case r.Err() != nil:
				return false, r.Err()
			}
			for _, e := range r.Events {
				h.see(rules, e)
			}
			if r.IsProgressNotify() && r.Header.Revision >= h.Present {
				return false, nil
			}
		case <-ctx.Done():
			return false, ctx.Err()
		}
	}
}

func (h *History) see(rules *inventory.Rules, e *clientv3.Event) {
	if e.PrevKv == nil || e.Kv.ModRevision > h.Present {
		return
	}
	rule := rules.Of(e.Kv.Key)
	if rule == nil || !rule.Seals() {
		return
	}
	if h.readable(e.PrevKv) {
		h.Plaintext++
		h.CompactAt = max(h.CompactAt, e.Kv.ModRevision)
	}
}

// compact compacts the history past everything that h found. Each member carries that out later:
// see settle.
func (h *History) compact(ctx context.Context, c *clientv3.Client) error {
	if h.CompactAt == 0 {
		return nil
	}
	_, err := c.Compact(ctx, h.CompactAt)
	if err != nil && !errors.Is(err, rpctypes.ErrCompacted) { // another client was faster
		return fmt.Errorf("compact at revision %d: %w", h.CompactAt, err)
	}
	return nil
}

// settle waits until m has carried out the compaction of h, and every earlier one, in its own file.
// A member answers a physical compaction after all work before it, also if the revision is
// compacted already and the answer is ErrCompacted.
func (h *History) settle(ctx context.Context, c *clientv3.Client, m *Member) error {
	at := max(h.CompactAt, h.Compacted)
	if at <= 0 {
		return nil // nothing was ever compacted
	}
	conn, err := c.Dial(m.Endpoint)
	if err != nil {
		return err
	}
	defer func() { _ = conn.Close() }() // its answer is here
	_, err = pb.NewKVClient(conn).Compact(ctx, &pb.CompactionRequest{Revision: at, Physical: true})
	if err = rpctypes.Error(err); errors.Is(err, rpctypes.ErrCompacted) {
		err = nil
	}
	return err
}

// Remove compacts the history past everything that h found, waits for each member to carry that out
// in its own file, for at most settle each, and defragments those that have, one after the other.
// [Member.Unconfirmed] is set for the others. defragmented is called after each member, with its
// size before.
func (h *History) Remove(
	ctx context.Context, c *clientv3.Client, members []Member, settle time.Duration, defragmented func(m *Member, before int64, took time.Duration),
) error {
	if err := h.compact(ctx, c); err != nil {
		return err
	}
	// First all members: one that falls behind may receive the database of another one.
	for i := range members {
		m := &members[i]
		limited, cancel := context.WithTimeout(ctx, settle)
		err := h.settle(limited, c, m)
		cancel()
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			m.Unconfirmed = fmt.Sprintf("it has not said within %s that its compaction is done: %v", settle, err)
		}
	}
	for i := range members {
		m := &members[i]
		if m.Unconfirmed != "" {
			continue
		}
		before, begun := m.DBSize, time.Now()
		if err := Defragment(ctx, c, m); err != nil {
			return err
		}
		defragmented(m, before, time.Since(begun))
	}
	return nil
}

// Member is a member of the etcd cluster, as returned by [Members].
type Member struct {
	ID       uint64 `json:"id"`
	Name     string `json:"name"`
	Endpoint string `json:"endpoint"` // "" if none answers
	Leader   bool   `json:"leader"`
	Learner  bool   `json:"learner"`
	DBSize   int64  `json:"dbSize"` // bytes
	InUse    int64  `json:"dbSizeInUse"`
	Applied  uint64 `json:"raftAppliedIndex"`
	Why      string `json:"why,omitempty"` // no endpoint answers
	// Unconfirmed is the reason why the member may still hold old values, and was not defragmented.
	Unconfirmed string `json:"unconfirmed,omitempty"`
}

const memberTimeout = 5 * time.Second

// Members returns every member of the cluster, the leader last. It connects to the endpoints of the
// client, and then to the client URLs that members advertise.
func Members(ctx context.Context, c *clientv3.Client) ([]Member, error) {
	list, err := c.MemberList(ctx)
	if err != nil {
		return nil, fmt.Errorf("list etcd's members: %w", err)
	}
	members := make([]Member, 0, len(list.Members))
	for _, m := range list.Members {
		members = append(members, Member{ID: m.ID, Name: m.Name, Learner: m.IsLearner, Why: "none of the endpoints and of its client URLs answers"})
	}
	inspect := func(endpoint string, want uint64) {
		limited, cancel := context.WithTimeout(ctx, memberTimeout)
		defer cancel()
		s, err := c.Status(limited, endpoint)
		if err != nil {
			return
		}
		i := slices.IndexFunc(members, func(m Member) bool { return m.ID == s.Header.MemberId })
		if i >= 0 && (want == 0 || want == s.Header.MemberId) {
			members[i].take(endpoint, s)
		}
	}
	for _, e := range c.Endpoints() {
		inspect(e, 0)
	}
	for i, m := range list.Members {
		for _, url := range m.ClientURLs {
			if members[i].Endpoint == "" {
				inspect(url, m.ID)
			}
		}
	}
	slices.SortStableFunc(members, func(a, b Member) int {
		switch {
		case a.Leader == b.Leader:
			return 0
		case a.Leader:
			return 1
		}
		return -1
	})
	return members, ctx.Err()
}

func (m *Member) take(endpoint string, s *clientv3.StatusResponse) {
	m.Endpoint, m.Why = endpoint, ""
	m.Leader = s.Leader == s.Header.MemberId
	m.DBSize, m.InUse, m.Applied = s.DbSize, s.DbSizeInUse, s.RaftAppliedIndex
}

// A member does not answer during its defragmentation.
const (
	defragTimeout = 10 * time.Minute
	healTimeout   = 2 * time.Minute
	healCheck     = 200 * time.Millisecond
)

// Defragment defragments a member's database file. It first checks that every member responds and
// that there is a leader, and afterwards waits until the member has caught up. It updates m.
func Defragment(ctx context.Context, c *clientv3.Client, m *Member) error {
	if err := healthy(ctx, c); err != nil {
		return fmt.Errorf("member %x is not defragmented, since another one would then be missing: %w", m.ID, err)
	}
	limited, cancel := context.WithTimeout(ctx, defragTimeout)
	_, err := c.Defragment(limited, m.Endpoint)
	cancel()
	if err != nil {
		return fmt.Errorf("defragment member %x at %s: %w", m.ID, m.Endpoint, err)
	}
	limited, cancel = context.WithTimeout(ctx, healTimeout)
	defer cancel()
	for {
		err := healthy(limited, c)
		if err == nil {
			s, serr := c.Status(limited, m.Endpoint)
			if serr == nil {
				m.take(m.Endpoint, s)
				return nil
			}
			err = serr
		}
		select {
		case <-time.After(healCheck):
		case <-limited.Done():
			return fmt.Errorf("after member %x was defragmented: %w", m.ID, err)
		}
	}
}

// healthy returns nil if every member responds, all agree on one leader, and none lags far behind.
func healthy(ctx context.Context, c *clientv3.Client) error {
	members, err := Members(ctx, c)
	if err != nil {
		return err
	}
	leaders, most := 0, uint64(0)
	for _, m := range members {
		if m.Endpoint == "" {
			return fmt.Errorf("member %x (%s) does not answer: %s", m.ID, m.Name, m.Why)
		}
		if m.Leader {
			leaders++
		}
		most = max(most, m.Applied)
	}
	if leaders != 1 {
		return errors.New("the members have no leader")
	}
	const lag = 1000 // entries of the raft log
	for _, m := range members {
		if m.Applied+lag < most {
			return fmt.Errorf("member %x (%s) lags behind: at raft index %d of %d", m.ID, m.Name, m.Applied, most)
		}
	}
	return nil
}
