package lifecycle

import (
	"context"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// BypassConfig configures a Bypass.
type BypassConfig struct {
	Client *clientv3.Client
	Rules  func() *Rules // of the moment
	// Found is told of each write of a value that its rule would have sealed and that is not. It must not block; key is its to keep.
	Found  func(rule *Rule, key string, revision int64)
	Logger *slog.Logger
}

// Bypass watches all keys under rules that seal for writes that went past the proxies. It looks at the first bytes of values alone.
type Bypass struct {
	BypassConfig
	changed chan struct{}
	next    map[string]int64 // the revision to go on with, by prefix; none: the present one
	told    bool             // that a watch does not work
}

// NewBypass makes a Bypass. It starts nothing.
func NewBypass(c BypassConfig) *Bypass {
	return &Bypass{BypassConfig: c, changed: make(chan struct{}, 1), next: make(map[string]int64)}
}

// RulesChanged says that Rules gives others now.
func (b *Bypass) RulesChanged() {
	select {
	case b.changed <- struct{}{}:
	default:
	}
}

// Run watches until ctx ends, and tells of what is stored from now on. A watch that breaks is begun again where it was.
func (b *Bypass) Run(ctx context.Context) {
	for ctx.Err() == nil {
		if b.watch(ctx) {
			continue
		}
		select {
		case <-ctx.Done():
		case <-b.changed:
		case <-time.After(fleetRetry):
		}
	}
}

// follow says where the watches under rules begin.
func (b *Bypass) follow(rules *Rules) (prefixes []string) {
	prefixes = rules.sealing()
	next := make(map[string]int64)
	for _, p := range prefixes {
		if rules.since > 0 {
			next[p] = rules.since + 1
		}
		for q, n := range b.next {
			if strings.HasPrefix(p, q) { // watched until now, alone or with others
				next[p] = n
			}
		}
	}
	b.next = next
	return prefixes
}

// watch watches until the rules have changed, which it reports, or a watch ends.
func (b *Bypass) watch(ctx context.Context) (changed bool) {
	ctx, stop := context.WithCancel(ctx)
	prefixes := b.follow(b.Rules())
	answers := make(chan answer)
	var all sync.WaitGroup
	defer all.Wait()
	defer stop()
	for _, p := range prefixes {
		w := b.Client.Watch(ctx, p, clientv3.WithPrefix(), clientv3.WithFilterDelete(), clientv3.WithFragment(), clientv3.WithRev(b.next[p]),
			clientv3.WithCreatedNotify(), clientv3.WithProgressNotify())
		all.Go(func() {
			for r := range w {
				select {
				case answers <- answer{p, r}:
				case <-ctx.Done():
				}
			}
			select {
			case answers <- answer{p, clientv3.WatchResponse{Canceled: true}}:
			case <-ctx.Done():
			}
		})
	}
	for {
		select {
		case <-ctx.Done():
			return false
		case a := <-answers:
			if !b.see(&a) {
				return false
			}
		case <-b.changed:
			return true
		}
	}
}

// answer is what the watch of one prefix gave.
type answer struct {
	prefix string
	clientv3.WatchResponse
}

// see looks at the events of one answer. It returns false if the watch is over.
func (b *Bypass) see(r *answer) bool {
	if r.CompactRevision > 0 {
		b.next[r.prefix] = r.CompactRevision // what was compacted in the meantime is not seen
	}
	if err := r.Err(); err != nil || r.Canceled {
		if !b.told && err != nil {
			b.Logger.Warn("writes that go past the proxy are not watched at the moment", "error", err)
		}
		b.told = b.told || err != nil
		return false
	}
	b.told = false
	rules := b.Rules()
	for _, e := range r.Events {
		if rule := rules.Of(e.Kv.Key); rule != nil && rule.seals() && !rule.Sealer.Sealed(e.Kv.Value) {
			b.Found(rule, string(e.Kv.Key), e.Kv.ModRevision)
		}
	}
	switch n := len(r.Events); {
	case n > 0:
		b.next[r.prefix] = r.Events[n-1].Kv.ModRevision + 1 // the header may be ahead of what is still to come
	case r.Created && b.next[r.prefix] > 0: // it has yet to catch up
	default:
		b.next[r.prefix] = r.Header.Revision + 1
	}
	return true
}

func (r *Rule) seals() bool { return r.WriteWith != Plaintext }

// sealing returns prefixes that together cover all rules that seal.
func (r *Rules) sealing() []string {
	return slices.DeleteFunc(r.Prefixes(), func(root string) bool {
		return !slices.ContainsFunc(r.list, func(rule Rule) bool { return rule.seals() && strings.HasPrefix(rule.Prefix, root) })
	})
}
