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

// BypassConfig configures WatchBypass.
type BypassConfig struct {
	Client *clientv3.Client
	Rules  func() *Rules // of the moment
	// Found is told of each write of a value that its rule would have sealed and that is not. It must not block; key is its to keep.
	Found  func(rule *Rule, key string, revision int64)
	Logger *slog.Logger
}

// WatchBypass watches all keys under rules that seal, until ctx ends, for writes that went past the proxies. It looks at the first bytes of values
// alone, and tells of what is stored from now on. A watch that breaks is begun again.
func WatchBypass(ctx context.Context, c BypassConfig) {
	b := &bypass{BypassConfig: c, next: make(map[string]int64)}
	for ctx.Err() == nil {
		b.watch(ctx)
		select {
		case <-ctx.Done():
		case <-time.After(fleetRetry):
		}
	}
}

// rulesCheck is how soon a watch follows a change of the rules.
const rulesCheck = 5 * time.Second

type bypass struct {
	BypassConfig
	next map[string]int64 // the revision to go on with, by prefix; none: the present one
	told bool             // that a watch does not work
}

// watch watches until the prefixes of the rules change or a watch ends.
func (b *bypass) watch(ctx context.Context) {
	ctx, stop := context.WithCancel(ctx)
	prefixes := b.Rules().sealing()
	answers := make(chan answer)
	var all sync.WaitGroup
	defer all.Wait()
	defer stop()
	for _, p := range prefixes {
		w := b.Client.Watch(ctx, p, clientv3.WithPrefix(), clientv3.WithFilterDelete(), clientv3.WithFragment(), clientv3.WithRev(b.next[p]))
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
	tick := time.NewTicker(rulesCheck)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case a := <-answers:
			if !b.see(&a) {
				return
			}
		case <-tick.C:
			if !slices.Equal(prefixes, b.Rules().sealing()) {
				return
			}
		}
	}
}

// answer is what the watch of one prefix gave.
type answer struct {
	prefix string
	clientv3.WatchResponse
}

// see looks at the events of one answer. It returns false if the watch is over.
func (b *bypass) see(r *answer) bool {
	if r.CompactRevision > 0 {
		delete(b.next, r.prefix) // what was compacted in the meantime is not seen
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
	b.next[r.prefix] = r.Header.Revision + 1
	return true
}

func (r *Rule) seals() bool { return r.WriteWith != Plaintext }

// sealing returns prefixes that together cover all rules that seal.
func (r *Rules) sealing() []string {
	return slices.DeleteFunc(r.Prefixes(), func(root string) bool {
		return !slices.ContainsFunc(r.list, func(rule Rule) bool { return rule.seals() && strings.HasPrefix(rule.Prefix, root) })
	})
}
