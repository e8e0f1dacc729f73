// Package coordination lets several proxies in front of one etcd cluster work together. Their only
// shared state is in etcd, below a configured prefix. Each proxy announces itself under a lease
// ([Fleet]). The rules that all proxies have in common are recorded, with proofs that require the
// KMS keys ([Agreement]). An [Election] chooses the process that does a job.
package coordination

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/logonce"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/restore"
)

// Member is the announcement of a proxy, stored in etcd below FleetConfig.Prefix + "proxies/" under
// a lease.
type Member struct {
	ID      string    `json:"id"` // unlike that of any other process
	Host    string    `json:"host"`
	PID     int       `json:"pid"`
	Version string    `json:"version"`
	Started time.Time `json:"started"`
	Policy  string    `json:"policy"` // digest of its rules, see [PolicyDigest]
	Record  string    `json:"record"` // digest of all that it would have on record
	// Jobs are what it does for all proxies if it is elected. Nil in the announcements of versions
	// that do not say it.
	Jobs []string `json:"jobs"`

	created int64 // revision
}

// PolicyDigest returns the hexadecimal SHA-256 of rules in canonical form.
func PolicyDigest(policy []byte) string {
	sum := sha256.Sum256(policy)
	return hex.EncodeToString(sum[:])
}

// Policy is what the proxies agree on.
type Policy struct {
	Rules     []byte   // in canonical form
	Record    []byte   // the rules, and what else must not be weakened, in canonical JSON
	Providers []string // that the rules encrypt with
}

// FleetConfig configures a Fleet.
type FleetConfig struct {
	Client *clientv3.Client
	// Prefix is the prefix of the keys that the proxies use for coordination. It ends in a slash.
	Prefix string
	// Self is the announcement of this proxy. [Fleet.SetPolicy] sets its policy.
	Self Member
	// ProofSealers encrypt and decrypt the proofs of an agreement, by provider.
	ProofSealers map[string]inventory.Sealer
	// Restored is called when a restore of etcd is noticed. It may be nil, and must not block.
	Restored func()
	Logger   *slog.Logger
}

// Fleet is this proxy as one of those in front of an etcd cluster. It announces the proxy and
// records the rules that all of them have in common. It is safe for concurrent use.
type Fleet struct {
	cfg     FleetConfig
	changed chan struct{}
	history restore.Detector
	logged  logonce.State // the last problem

	mu      sync.Mutex
	policy  Policy
	leads   []string // jobs
	members int      // announced proxies
}

// NewFleet returns a Fleet. It does nothing until [Fleet.Run].
func NewFleet(c FleetConfig) *Fleet {
	return &Fleet{cfg: c, changed: make(chan struct{}, 1)}
}

// The announcement of a crashed proxy disappears when its lease expires.
const (
	leaseSeconds = 30
	fleetRetry   = 5 * time.Second
	fleetCheck   = time.Minute
	fleetTimeout = 10 * time.Second
	// fleetSpread is how long a proxy waits after a change of the announcements, at most, per
	// announced proxy. Each proxy reads all announcements after a change. When many start at once,
	// each of them would otherwise cause as many reads as there are proxies.
	fleetSpread = 50 * time.Millisecond
)

// SetPolicy sets the policy of this proxy.
func (f *Fleet) SetPolicy(p Policy) {
	f.mu.Lock()
	f.policy = p
	f.mu.Unlock()
	select {
	case f.changed <- struct{}{}:
	default:
	}
}

func (f *Fleet) current() Policy {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.policy
}

// Leads reports whether this proxy does a job of [Member.Jobs] that only one of them must do. For a
// moment after a change, two proxies may both do it.
func (f *Fleet) Leads(job string) bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Contains(f.leads, job)
}

// leader returns the ID of the member that does a job: the first announced one that has it. The
// first of all does it too if its version does not announce jobs.
func leader(members []Member, job string) string {
	for i, m := range members {
		if i == 0 && m.Jobs == nil || slices.Contains(m.Jobs, job) {
			return m.ID
		}
	}
	return ""
}

// setMembers takes over who is announced, the oldest first.
func (f *Fleet) setMembers(members []Member) {
	var leads []string
	for _, job := range f.cfg.Self.Jobs {
		if leader(members, job) == f.cfg.Self.ID {
			leads = append(leads, job)
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.leads, f.members = leads, len(members)
}

// delay returns how long to wait for further changes, after a change of the announcements.
func (f *Fleet) delay() time.Duration {
	f.mu.Lock()
	defer f.mu.Unlock()
	return rand.N(fleetSpread * time.Duration(max(1, f.members))) //nolint:gosec // jitter is no secret
}

// Members returns the announced proxies, the oldest announcement first.
func (f *Fleet) Members(ctx context.Context) ([]Member, error) {
	r, err := f.cfg.Client.Get(ctx, f.cfg.Prefix+"proxies/", clientv3.WithPrefix())
	if err != nil {
		return nil, fmt.Errorf("read which proxies there are: %w", err)
	}
	members := make([]Member, 0, len(r.Kvs))
	for _, kv := range r.Kvs {
		var m Member
		if err := json.Unmarshal(kv.Value, &m); err != nil {
			// An announcement that cannot be decoded was written by another program. It must not
			// hide the others.
			m = Member{ID: string(kv.Key[len(f.cfg.Prefix+"proxies/"):]), Jobs: []string{}}
		}
		m.created = kv.CreateRevision
		members = append(members, m)
	}
	slices.SortFunc(members, func(a, b Member) int { return cmp.Compare(a.created, b.created) })
	return members, nil
}

// Run announces this proxy and records agreements until ctx ends, and then removes the
// announcement. It logs a failure once, and retries.
func (f *Fleet) Run(ctx context.Context) {
	for ctx.Err() == nil {
		f.logProblem(f.announce(ctx))
		f.setMembers(nil)
		select {
		case <-ctx.Done():
		case <-time.After(fleetRetry):
		}
	}
}

// logProblem logs an error unless it is the same as the last one.
func (f *Fleet) logProblem(err error) {
	text := ""
	if err != nil && !errors.Is(err, context.Canceled) && status.Code(err) != codes.Canceled {
		text = err.Error()
	}
	if f.logged.Changed(text) && text != "" {
		f.cfg.Logger.Warn("this proxy is not announced in etcd, and cannot agree with others on their rules; it keeps trying", "error", text)
	}
}

// announce keeps the announcement until its lease is lost or ctx ends.
func (f *Fleet) announce(ctx context.Context) error {
	c := f.cfg.Client
	granting, cancel := context.WithTimeout(ctx, fleetTimeout)
	lease, err := c.Grant(granting, leaseSeconds)
	cancel()
	if err != nil {
		return fmt.Errorf("get a lease: %w", err)
	}
	defer func() {
		revoking, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_, _ = c.Revoke(revoking, lease.ID) // otherwise it expires
	}()
	alive, stop := context.WithCancel(ctx)
	defer stop()
	kept, err := c.KeepAlive(alive, lease.ID)
	if err != nil {
		return fmt.Errorf("keep a lease: %w", err)
	}
	others := c.Watch(alive, f.cfg.Prefix, clientv3.WithPrefix())
	tick := time.NewTicker(fleetCheck)
	defer tick.Stop()
	select {
	case <-f.changed: // the announcement has this policy already
	default:
	}
	if err := f.put(ctx, lease.ID); err != nil {
		return err
	}
	for {
		err := f.reconcile(ctx)
		if errors.Is(err, errAnnouncementGone) {
			return nil
		}
		f.logProblem(err)
		var settled <-chan time.Time // after a change
		for idle := true; idle; {
			select {
			case <-ctx.Done():
				return nil
			case _, ok := <-kept:
				if !ok {
					return nil // the lease is gone: a new one
				}
				continue
			case _, ok := <-others:
				if !ok {
					return nil
				}
				if settled == nil {
					settled = time.After(f.delay())
				}
				continue
			case <-settled:
			case <-f.changed:
				if err := f.put(ctx, lease.ID); err != nil {
					return err
				}
			case <-tick.C:
			}
			idle = false
		}
	}
}

func (f *Fleet) put(ctx context.Context, lease clientv3.LeaseID) error {
	ctx, cancel := context.WithTimeout(ctx, fleetTimeout)
	defer cancel()
	m := f.cfg.Self
	policy := f.current()
	m.Policy, m.Record, m.Jobs = PolicyDigest(policy.Rules), PolicyDigest(policy.Record), append([]string{}, m.Jobs...)
	value, err := json.Marshal(m)
	if err != nil {
		return err
	}
	if _, err := f.cfg.Client.Put(ctx, f.cfg.Prefix+"proxies/"+m.ID, string(value), clientv3.WithLease(lease)); err != nil {
		return fmt.Errorf("announce this proxy: %w", err)
	}
	return nil
}

// errAnnouncementGone is returned when the announcement of this proxy was removed.
var errAnnouncementGone = errors.New("the announcement is gone")

// reconcile reads the announcements, and records the agreement if all proxies have the same rules.
func (f *Fleet) reconcile(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, fleetTimeout)
	defer cancel()
	if err := f.checkRestore(ctx); err != nil {
		return err
	}
	members, err := f.Members(ctx)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(members, func(m Member) bool { return m.ID == f.cfg.Self.ID }) {
		return errAnnouncementGone
	}
	f.setMembers(members)
	policy := f.current()
	if slices.ContainsFunc(members, func(m Member) bool { return m.Record != PolicyDigest(policy.Record) }) {
		return nil
	}
	return f.recordAgreement(ctx, policy.Record, policy.Providers)
}

// checkRestore logs a restore of etcd. It needs no other action: reconcile reads everything else
// again, and the announcement is written again because its lease is gone with the old data.
func (f *Fleet) checkRestore(ctx context.Context) error {
	restored, before, now, err := f.history.Check(ctx, f.cfg.Client, f.key())
	if err != nil || !restored {
		return err
	}
	f.cfg.Logger.Warn("etcd has older data than before, as after a restore", "before", before.String(), "now", now.String())
	if f.cfg.Restored != nil {
		f.cfg.Restored()
	}
	return nil
}

// ErrOtherRules is in the error of [Fleet.SameRules].
var ErrOtherRules = errors.New("proxies have other rules: they may be unable to read what is written by these")

// SameRules returns an error that names the proxies that announced other rules than those of
// [Fleet.SetPolicy].
func (f *Fleet) SameRules(ctx context.Context) error {
	members, err := f.Members(ctx)
	if err != nil {
		return err
	}
	policy := f.current()
	var others []string
	for _, m := range members {
		if m.Policy != PolicyDigest(policy.Rules) {
			others = append(others, m.ID)
		}
	}
	if len(others) > 0 {
		return fmt.Errorf("%w: %s", ErrOtherRules, strings.Join(others, ", "))
	}
	return nil
}
