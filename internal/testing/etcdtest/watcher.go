package etcdtest

import (
	"context"
	"reflect"
	"sync"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// watcher is a [clientv3.Watcher] in place of etcd's own, which waits on a channel of its package
// and so keeps the time of a bubble of testing/synctest from passing. Like that one it continues a
// watch whose stream breaks.
type watcher struct {
	client pb.WatchClient

	mu      sync.Mutex
	streams map[pb.Watch_WatchClient]bool
	ended   chan struct{}
	end     func()
	running sync.WaitGroup
}

func newWatcher(client pb.WatchClient) *watcher {
	ended := make(chan struct{})
	return &watcher{client: client, streams: make(map[pb.Watch_WatchClient]bool), ended: ended, end: sync.OnceFunc(func() { close(ended) })}
}

// Watch implements [clientv3.Watcher].
func (w *watcher) Watch(ctx context.Context, key string, opts ...clientv3.OpOption) clientv3.WatchChan {
	op := clientv3.OpGet(key, opts...)
	create := &pb.WatchCreateRequest{
		Key: op.KeyBytes(), RangeEnd: op.RangeBytes(), StartRevision: op.Rev(), PrevKv: reflect.ValueOf(op).FieldByName("prevKV").Bool(),
	}
	responses := make(chan clientv3.WatchResponse)
	ctx, cancel := context.WithCancel(ctx)
	go func() {
		select {
		case <-w.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	w.running.Go(func() {
		defer close(responses)
		defer cancel()
		for ctx.Err() == nil {
			if w.stream(ctx, create, responses) {
				return
			}
			select {
			case <-time.After(100 * time.Millisecond):
			case <-ctx.Done():
			}
		}
	})
	return responses
}

// stream watches until its stream ends. It advances the start revision of create. over says
// that the watch has ended.
func (w *watcher) stream(ctx context.Context, create *pb.WatchCreateRequest, responses chan<- clientv3.WatchResponse) (over bool) {
	stream, err := w.client.Watch(ctx)
	if err != nil {
		return false
	}
	if err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: create}}); err != nil {
		return false
	}
	w.mu.Lock()
	w.streams[stream] = true
	w.mu.Unlock()
	defer func() {
		w.mu.Lock()
		defer w.mu.Unlock()
		delete(w.streams, stream)
	}()
	for {
		r, err := stream.Recv()
		if err != nil {
			return false
		}
		if r.GetCreated() {
			if create.GetStartRevision() == 0 {
				create.StartRevision = r.GetHeader().GetRevision() + 1
			}
			continue
		}
		response := clientv3.WatchResponse{Header: r.GetHeader(), CompactRevision: r.GetCompactRevision(), Canceled: r.GetCanceled()}
		for _, e := range r.GetEvents() {
			response.Events = append(response.Events, (*clientv3.Event)(e))
			create.StartRevision = e.GetKv().GetModRevision() + 1
		}
		select {
		case responses <- response:
		case <-ctx.Done():
			return true
		}
		if r.GetCanceled() {
			return true
		}
	}
}

// RequestProgress implements [clientv3.Watcher].
func (w *watcher) RequestProgress(context.Context) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	for stream := range w.streams {
		// its reader finds out
		_ = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_ProgressRequest{ProgressRequest: &pb.WatchProgressRequest{}}})
	}
	return nil
}

// Close implements [clientv3.Watcher].
func (w *watcher) Close() error {
	w.end()
	w.running.Wait()
	return nil
}
