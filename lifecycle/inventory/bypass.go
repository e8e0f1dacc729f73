package inventory

import (
	"context"
	"errors"
	"log/slog"
	"math"
	"slices"
	"strings"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/restore"
)

// BypassConfig configures a BypassWatcher.
type BypassConfig struct {
	Client *clientv3.Client
	Rules  func() *Rules // of the moment
	// Found is told of each write of a value that its rule would have sealed and that is not. It must not block; key is its to keep.
	Found func(rule *Rule, key string, revision int64)
	// Restored is told that etcd has older data than before, as after a restore. May be nil.
	Restored func()
	Logger   *slog.Logger
}

// BypassWatcher watches all keys under rules that seal for writes that went past the proxies. It looks at the first bytes of values alone.
//
// What a watch cannot tell is read: after a compaction the values that were written meanwhile, and after a restore of etcd all values.
type BypassWatcher struct {
	BypassConfig
	changed chan struct{}
	next    map[string]int64 // the revision to go on with, by prefix; none: the present one
	missed  map[string]int64 // the revision from which on writes were missed, by prefix; 0: all of them
	told    bool             // that a watch does not work
	history restore.Detector
}

// NewBypassWatcher makes a BypassWatcher. It starts nothing.
func NewBypassWatcher(c BypassConfig) *BypassWatcher {
	return &BypassWatcher{BypassConfig: c, changed: make(chan struct{}, 1), next: make(map[string]int64), missed: make(map[string]int64)}
}

// RulesChanged says that Rules gives others now.
func (b *BypassWatcher) RulesChanged() {
	select {
	case b.changed <- struct{}{}:
	default:
	}
}

// Run watches until ctx ends, and tells of what is stored from now on. A watch that breaks is begun again where it was.
func (b *BypassWatcher) Run(ctx context.Context) {
	for ctx.Err() == nil {
		if b.watch(ctx) {
			continue
		}
		select {
		case <-ctx.Done():
		case <-b.changed:
		case <-time.After(bypassRetry):
		}
	}
}

// requestTimeout bounds one read of etcd's revision.
const requestTimeout = 10 * time.Second

// bypassRetry is after a watch that has ended.
const bypassRetry = time.Second

// follow says where the watches under rules begin.
func (b *BypassWatcher) follow(rules *Rules) (prefixes []string) {
	prefixes = rules.SealingPrefixes()
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

// watch watches until the rules change, which it reports, or the stream of watches ends.
func (b *BypassWatcher) watch(ctx context.Context) (changed bool) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	prefixes := b.follow(b.Rules())
	if err := b.catchUp(ctx, prefixes); err != nil {
		b.fails(ctx, err)
		return false
	}
	// A stream of its own: the watcher of etcd's client library reconnects, and then continues at a revision that may be in
	// the future of a restored etcd.
	stream, err := pb.NewWatchClient(b.Client.ActiveConnection()).Watch(ctx, grpc.MaxCallRecvMsgSize(math.MaxInt32))
	for i := 0; i < len(prefixes) && err == nil; i++ {
		keys := clientv3.OpGet(prefixes[i], clientv3.WithPrefix())
		err = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
			Key: keys.KeyBytes(), RangeEnd: keys.RangeBytes(), StartRevision: b.next[prefixes[i]], ProgressNotify: true, Fragment: true,
			Filters: []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_NODELETE},
		}}})
	}
	if err != nil {
		b.fails(ctx, err)
		return false
	}
	responses := make(chan *pb.WatchResponse)
	go func() {
		defer close(responses)
		for {
			r, err := stream.Recv()
			if err != nil {
				return // a stream that ends is opened again
			}
			select {
			case responses <- r:
			case <-ctx.Done():
				return
			}
		}
	}()
	watched := make(map[int64]string) // prefixes by the ID of their watch
	for {
		select {
		case <-ctx.Done():
			return false
		case r, ok := <-responses:
			if !ok {
				return false
			}
			if r.GetCreated() && len(watched) < len(prefixes) { // in the order of the requests
				watched[r.GetWatchId()] = prefixes[len(watched)]
			}
			if !b.see(watched[r.GetWatchId()], r) {
				return false
			}
		case <-b.changed:
			return true
		}
	}
}

// catchUp reads what was missed, and after a restore of etcd everything.
func (b *BypassWatcher) catchUp(ctx context.Context, prefixes []string) error {
	if len(prefixes) == 0 {
		return nil
	}
	limited, cancel := context.WithTimeout(ctx, requestTimeout)
	restored, before, now, err := b.history.Check(limited, b.Client, prefixes[0])
	cancel()
	if err != nil {
		return err
	}
	if restored {
		b.Logger.Warn("etcd has older data than before, as after a restore: the values under rules are read again for plaintext",
			"before", before.String(), "now", now.String(), "hint", "run etcd-kms-proxy status: it counts the values that are not encrypted as the rules say")
		for _, p := range prefixes {
			delete(b.next, p)
			b.missed[p] = 0
		}
		if b.Restored != nil {
			b.Restored()
		}
	}
	for p, from := range b.missed {
		span, err := b.reread(ctx, p, from)
		if err != nil {
			return err
		}
		delete(b.missed, p)
		if slices.Contains(prefixes, p) {
			b.next[p] = span.First + 1
		}
	}
	return nil
}

// reread tells of the plaintext values that were written from a revision on, as far as they are still there.
func (b *BypassWatcher) reread(ctx context.Context, prefix string, from int64) (Span, error) {
	rules := b.Rules()
	return Scan(ctx, b.Client, []string{prefix}, 0, func(kv *mvccpb.KeyValue) error {
		if kv.ModRevision >= from {
			b.look(rules, kv)
		}
		return nil
	})
}

// look tells of a value that its rule would have sealed and that is not.
func (b *BypassWatcher) look(rules *Rules, kv *mvccpb.KeyValue) {
	if rule := rules.Of(kv.Key); rule != nil && rule.Seals() && !rule.Sealer.Sealed(kv.Value) {
		b.Found(rule, string(kv.Key), kv.ModRevision)
	}
}

// fails says once that there is no watch.
func (b *BypassWatcher) fails(ctx context.Context, err error) {
	if b.told || ctx.Err() != nil {
		return
	}
	b.told = true
	b.Logger.Warn("writes that go past the proxy are not watched at the moment", "error", err)
}

// see handles a response of the watch of a prefix. It returns false if the watch is over.
func (b *BypassWatcher) see(prefix string, r *pb.WatchResponse) bool {
	if r.GetCompactRevision() > 0 { // what was compacted in the meantime is not seen
		if from, known := b.missed[prefix]; !known || b.next[prefix] < from {
			b.missed[prefix] = b.next[prefix]
		}
		b.next[prefix] = r.GetCompactRevision()
	}
	if r.GetCanceled() {
		if r.GetCompactRevision() == 0 && r.GetCancelReason() != "" {
			b.fails(context.Background(), errors.New(r.GetCancelReason()))
		}
		return false
	}
	b.told = false
	b.history.Observe(r.GetHeader())
	rules := b.Rules()
	for _, e := range r.GetEvents() {
		b.look(rules, e.GetKv())
	}
	switch n := len(r.GetEvents()); {
	case n > 0 && r.GetFragment(): // more events of this revision follow
		b.next[prefix] = r.GetEvents()[n-1].GetKv().GetModRevision()
	case n > 0:
		b.next[prefix] = r.GetEvents()[n-1].GetKv().GetModRevision() + 1 // the header may be ahead of what is still to come
	case r.GetCreated() && b.next[prefix] > 0: // it has yet to catch up
	default:
		b.next[prefix] = r.GetHeader().GetRevision() + 1
	}
	return true
}
