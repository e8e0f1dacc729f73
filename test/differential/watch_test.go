package differential

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// watched is what one stream of watches has received. The distribution of events over responses is
// random, so they are joined. Everything else is kept.
type watched struct {
	mu       sync.Mutex
	created  []*pb.WatchResponse // in order, with their headers
	canceled map[int64][]*pb.WatchResponse
	events   map[int64][]*mvccpb.Event
	progress int64 // revision of the last response to a progress request
	largest  int   // bytes of the largest response with more than one event
	err      error
	changed  chan struct{} // closed and replaced at each change
}

// watcher is one stream on one side.
type watcher struct {
	stream pb.Watch_WatchClient
	cancel context.CancelFunc
	done   chan struct{}
	seen   watched
}

func (s *side) openWatch(ctx context.Context) (*watcher, error) {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := s.watch.Watch(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	w := &watcher{stream: stream, cancel: cancel, done: make(chan struct{})}
	w.seen = watched{canceled: map[int64][]*pb.WatchResponse{}, events: map[int64][]*mvccpb.Event{}, changed: make(chan struct{})}
	go w.receive()
	return w, nil
}

func (w *watcher) close() {
	w.cancel()
	<-w.done
}

func (w *watcher) receive() {
	defer close(w.done)
	for {
		response, err := w.stream.Recv()
		w.seen.add(response, err)
		if err != nil {
			return
		}
	}
}

func (s *watched) add(response *pb.WatchResponse, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	close(s.changed)
	s.changed = make(chan struct{})
	if err != nil {
		s.err = err
		return
	}
	if len(response.Events) > 1 {
		s.largest = max(s.largest, proto.Size(response))
	}
	response.Header.RaftTerm = 0
	switch {
	case response.Created:
		s.created = append(s.created, response)
	case response.Canceled:
		s.canceled[response.WatchId] = append(s.canceled[response.WatchId], response)
	case response.WatchId == -1:
		s.progress = response.Header.Revision
	}
	s.events[response.WatchId] = append(s.events[response.WatchId], response.Events...)
}

// until waits until a condition holds for what was received.
func (w *watcher) until(within time.Duration, met func(*watched) bool) error {
	timer := time.NewTimer(within)
	defer timer.Stop()
	for {
		w.seen.mu.Lock()
		ok, err, changed := met(&w.seen), w.seen.err, w.seen.changed
		w.seen.mu.Unlock()
		if ok {
			return nil
		}
		if err != nil {
			return fmt.Errorf("watch stream: %v %q", status.Code(err), status.Convert(err).Message())
		}
		select {
		case <-changed:
		case <-timer.C:
			return context.DeadlineExceeded
		}
	}
}

// create starts a watch and waits for the response.
func (w *watcher) create(request *pb.WatchCreateRequest) error {
	w.seen.mu.Lock()
	want := len(w.seen.created) + 1
	w.seen.mu.Unlock()
	if err := w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: request}}); err != nil {
		return err
	}
	return w.until(30*time.Second, func(s *watched) bool { return len(s.created) >= want })
}

func (w *watcher) stop(id int64) error {
	w.seen.mu.Lock()
	want := len(w.seen.canceled[id]) + 1
	w.seen.mu.Unlock()
	if err := w.send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CancelRequest{CancelRequest: &pb.WatchCancelRequest{WatchId: id}}}); err != nil {
		return err
	}
	return w.until(30*time.Second, func(s *watched) bool { return len(s.canceled[id]) >= want })
}

// drain waits until every watch of the stream has received all events up to revision. etcd responds
// to a progress request only when all watches are synchronized, so the request is repeated. etcd
// also counts watches that compaction ended as unsynchronized until the client cancels them.
func (w *watcher) drain(revision int64) error {
	deadline := time.Now().Add(30 * time.Second)
	for {
		for _, id := range w.compacted() {
			if err := w.stop(id); err != nil {
				return err
			}
		}
		if len(w.active()) == 0 {
			if len(w.compacted()) > 0 {
				continue // the last one has just ended
			}
			return nil
		}
		request := &pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}}
		if err := w.send(request); err != nil {
			return err
		}
		err := w.until(15*time.Millisecond, func(s *watched) bool { return s.progress >= revision })
		if !errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("no progress up to revision %d within 30 s", revision)
		}
	}
}

// active returns the watches that were created and have not ended, lowest ID first.
func (w *watcher) active() []int64 {
	w.seen.mu.Lock()
	defer w.seen.mu.Unlock()
	var ids []int64
	for _, created := range w.seen.created {
		if created.WatchId >= 0 && len(w.seen.canceled[created.WatchId]) == 0 {
			ids = append(ids, created.WatchId)
		}
	}
	slices.Sort(ids)
	return ids
}

// compacted returns the watches that compaction ended and the client has not canceled yet.
func (w *watcher) compacted() []int64 {
	w.seen.mu.Lock()
	defer w.seen.mu.Unlock()
	var ids []int64
	for id, responses := range w.seen.canceled {
		if len(responses) == 1 && responses[0].CompactRevision != 0 {
			ids = append(ids, id)
		}
	}
	return ids
}

func (w *watcher) send(request *pb.WatchRequest) error {
	if err := w.stream.Send(request); err != nil {
		return fmt.Errorf("send watch request: %w", err)
	}
	return nil
}

// differs describes the first difference between two streams, or returns "". It returns how many
// watches differ only by previous values that one side left out: etcd registers a watch before it
// notes that the client wants previous values, so that a watch from a past revision may get its
// first events without them (3.7.3, etcdserver/api/v3rpc/watch.go).
func (s *watched) differs(other *watched) (difference string, withoutPrevious int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	other.mu.Lock()
	defer other.mu.Unlock()
	if len(s.created) != len(other.created) {
		return fmt.Sprintf("%d watches were created on bare etcd, %d through the proxy", len(s.created), len(other.created)), 0
	}
	for i := range s.created {
		if !proto.Equal(s.created[i], other.created[i]) {
			return fmt.Sprintf("watch %d was created\n bare etcd: %s\n the proxy: %s", i, text(s.created[i]), text(other.created[i])), 0
		}
	}
	ids := map[int64]bool{}
	for _, side := range []*watched{s, other} {
		for id := range side.events {
			ids[id] = true
		}
		for id := range side.canceled {
			ids[id] = true
		}
	}
	for id := range ids {
		a, b := s.canceled[id], other.canceled[id]
		if !slices.EqualFunc(a, b, func(a, b *pb.WatchResponse) bool { return proto.Equal(a, b) }) {
			return fmt.Sprintf("watch %d was canceled\n bare etcd: %v\n the proxy: %v", id, a, b), 0
		}
		switch x, y := list(s.events[id]), list(other.events[id]); {
		case x == y:
		case slices.EqualFunc(s.events[id], other.events[id], equalButPrevious):
			withoutPrevious++
		default:
			return fmt.Sprintf("events of watch %d\n bare etcd:\n%s the proxy:\n%s", id, x, y), 0
		}
	}
	return "", withoutPrevious
}

// equalButPrevious reports whether two events are equal, or one lacks the previous value.
func equalButPrevious(a, b *mvccpb.Event) bool {
	if (a.PrevKv == nil) != (b.PrevKv == nil) {
		a, b = proto.CloneOf(a), proto.CloneOf(b)
		a.PrevKv, b.PrevKv = nil, nil
	}
	return proto.Equal(a, b)
}

func (s *watched) count() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, events := range s.events {
		n += len(events)
	}
	return n
}

func list(events []*mvccpb.Event) string {
	var b strings.Builder
	// On both sides, a watch receives the events of one revision in the order of the operations.
	for _, event := range events {
		data, _ := proto.MarshalOptions{Deterministic: true}.Marshal(event)
		fmt.Fprintf(&b, "  %s (%d bytes)\n", text(event), len(data))
	}
	return b.String()
}

// watchPair is the same stream of watches on both sides.
type watchPair struct {
	*pair
	bare, proxy *watcher
	future      int64 // the latest revision at which a watch starts
	counted     int
	// watches that differ by previous values, of which etcd has left out some
	withoutPrevious int
}

func (p *pair) openWatch(ctx context.Context) *watchPair {
	p.t.Helper()
	w := &watchPair{pair: p}
	var err error
	if w.bare, err = p.bare.openWatch(ctx); err != nil {
		p.fail("open watch on bare etcd: %v", err)
	}
	if w.proxy, err = p.proxy.openWatch(ctx); err != nil {
		p.fail("open watch through the proxy: %v", err)
	}
	p.t.Cleanup(w.close)
	return w
}

func (w *watchPair) close() {
	w.bare.close()
	w.proxy.close()
}

func (w *watchPair) both(what string, act func(*watcher) error) {
	w.t.Helper()
	w.trace = append(w.trace, what)
	if err := act(w.bare); err != nil {
		w.fail("%s on bare etcd: %v", what, err)
	}
	if err := act(w.proxy); err != nil {
		w.fail("%s through the proxy: %v", what, err)
	}
}

func (w *watchPair) create(request *pb.WatchCreateRequest) {
	w.t.Helper()
	w.future = max(w.future, request.StartRevision)
	w.both("watch "+text(request), func(side *watcher) error { return side.create(request) })
}

func (w *watchPair) stop(id int64) {
	w.t.Helper()
	w.both(fmt.Sprintf("cancel watch %d", id), func(side *watcher) error { return side.stop(id) })
}

// check drains both streams and compares all that they have received.
func (w *watchPair) check(ctx context.Context) {
	w.t.Helper()
	for w.revision < w.future {
		// etcd counts a watch that starts in the future as unsynchronized.
		w.do(ctx, &pb.PutRequest{Key: []byte("time passes")})
	}
	w.both(fmt.Sprintf("watches reach revision %d", w.revision), func(side *watcher) error { return side.drain(w.revision) })
	difference, withoutPrevious := w.bare.seen.differs(&w.proxy.seen)
	if difference != "" {
		w.fail("%s", difference)
	}
	if w.counts != nil {
		w.counts[noPrevious] += max(0, withoutPrevious-w.withoutPrevious)
		w.withoutPrevious = withoutPrevious
		events := w.bare.seen.count()
		w.counts["events"] += events - w.counted
		w.counted = events
	}
}

// watch creates a watch that starts at one of the last revisions, at the current one, or in the
// future.
func (g *generator) watch(now int64) *pb.WatchCreateRequest {
	key, end := g.span()
	r := &pb.WatchCreateRequest{
		Key: []byte(key), RangeEnd: []byte(end), PrevKv: g.chance(60), Fragment: g.chance(30), ProgressNotify: g.chance(30),
	}
	if g.chance(60) {
		key = "/s/"
		r.Key, r.RangeEnd = []byte(key), []byte(prefixEnd(key))
	}
	if g.chance(20) {
		r.Filters = []pb.WatchCreateRequest_FilterType{pb.WatchCreateRequest_FilterType(g.IntN(2))}
	}
	switch g.IntN(6) {
	case 0:
		r.StartRevision = now + g.Int64N(5)
	case 1:
		r.StartRevision = 1
	case 2, 3, 4:
		r.StartRevision = max(1, now-g.Int64N(30))
	}
	if g.chance(10) {
		r.WatchId = 1 + g.Int64N(3) // already in use, sometimes
	}
	return r
}
