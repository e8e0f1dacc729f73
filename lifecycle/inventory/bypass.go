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
	// Found is called with each plaintext value that was written under a rule that encrypts. It
	// must not block, and may keep key.
	Found func(rule *Rule, key string, revision int64)
	// Restored is called when a restore of etcd is noticed. It may be nil, and must not block.
	Restored func()
	Logger   *slog.Logger
}

// BypassWatcher watches the keys under rules that encrypt, and reports plaintext that was written
// to etcd directly. It examines the first bytes of values only.
//
// Events that a watch has missed are made up for by reads: after a compaction, values written since
// the last event are read again, and after a restore of etcd, all values.
type BypassWatcher struct {
	BypassConfig
	changed chan struct{}
	next    map[string]int64 // the revision to continue from, by prefix; none: the current one
	// the revision from which on writes were missed, by prefix; 0: all of them
	missed  map[string]int64
	failing bool // that a watch does not work
	history restore.Detector
}

// NewBypassWatcher returns a BypassWatcher. It does nothing until [BypassWatcher.Run].
func NewBypassWatcher(c BypassConfig) *BypassWatcher {
	return &BypassWatcher{BypassConfig: c, changed: make(chan struct{}, 1), next: make(map[string]int64), missed: make(map[string]int64)}
}

// RulesChanged makes the watcher call Rules again.
func (b *BypassWatcher) RulesChanged() {
	select {
	case b.changed <- struct{}{}:
	default:
	}
}

// Run reports plaintext that is written until ctx ends. A watch that breaks continues where it was.
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

// requestTimeout limits one read of the current revision.
const requestTimeout = 10 * time.Second

// bypassRetry is the pause before a watch is opened again.
const bypassRetry = time.Second

// follow sets the start revisions of the watches for rules.
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

// watch reports whether it ended because the rules have changed. Otherwise the stream has ended.
func (b *BypassWatcher) watch(ctx context.Context) (changed bool) {
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	prefixes := b.follow(b.Rules())
	if err := b.catchUp(ctx, prefixes); err != nil {
		b.fails(ctx, err)
		return false
	}
	// This opens its own stream, because the watcher of etcd's client library reconnects and would
	// then continue at a revision that a restored etcd does not have yet.
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
				return // the caller opens a new stream
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
			if !b.handle(watched[r.GetWatchId()], r) {
				return false
			}
		case <-b.changed:
			return true
		}
	}
}

// catchUp reads the values whose events were missed, and all values after a restore of etcd.
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
		if b.Restored != nil {
			b.Restored()
		}
		for _, p := range prefixes {
			delete(b.next, p)
			b.missed[p] = 0
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

// reread reports plaintext values that were written since a revision and still exist.
func (b *BypassWatcher) reread(ctx context.Context, prefix string, from int64) (Span, error) {
	rules := b.Rules()
	return Scan(ctx, b.Client, []string{prefix}, 0, func(kv *mvccpb.KeyValue) error {
		if kv.ModRevision >= from {
			b.check(rules, kv)
		}
		return nil
	})
}

// check reports a value that its rule would have encrypted and that is plaintext.
func (b *BypassWatcher) check(rules *Rules, kv *mvccpb.KeyValue) {
	if rule := rules.Of(kv.Key); rule != nil && rule.Seals() && !rule.Sealer.Sealed(kv.Value) {
		b.Found(rule, string(kv.Key), kv.ModRevision)
	}
}

// fails logs once that the watch does not work.
func (b *BypassWatcher) fails(ctx context.Context, err error) {
	if b.failing || ctx.Err() != nil {
		return
	}
	b.failing = true
	b.Logger.Warn("the watch for writes to etcd directly is interrupted", "error", err)
}

// handle processes a response of the watch of a prefix. It returns false if the watch has ended.
func (b *BypassWatcher) handle(prefix string, r *pb.WatchResponse) bool {
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
	b.failing = false
	b.history.Observe(r.GetHeader())
	rules := b.Rules()
	for _, e := range r.GetEvents() {
		b.check(rules, e.GetKv())
	}
	switch n := len(r.GetEvents()); {
	case n > 0 && r.GetFragment(): // more events of this revision follow
		b.next[prefix] = r.GetEvents()[n-1].GetKv().GetModRevision()
	case n > 0:
		// the header may be ahead of what is still to come
		b.next[prefix] = r.GetEvents()[n-1].GetKv().GetModRevision() + 1
	case r.GetCreated() && b.next[prefix] > 0: // it has yet to catch up
	default:
		b.next[prefix] = r.GetHeader().GetRevision() + 1
	}
	return true
}
