package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"google.golang.org/grpc/metadata"
)

// Sizes of the values, in bytes.
const (
	smallValue = 256
	largeValue = 1024
)

// getKeys is how many keys the gets choose from.
const getKeys = 1000

// row is one line of the report.
type row struct {
	name    string
	unit    string // what CPU time and throughput are counted by
	clients int
	// open connects to a subject and returns what one client does.
	open func(ctx context.Context, b *bed, s *subject, clients int) (*workload, error)
}

// workload is a row at work on one subject.
type workload struct {
	// do is one operation of one client. It returns how many units it was.
	do    func(ctx context.Context, client int) (int, error)
	close func()
}

func rows(cfg config) []row {
	var rs []row
	for _, clients := range []int{1, 64} {
		what := fmt.Sprintf(", %d clients", clients)
		if clients == 1 {
			what = ", 1 client"
		}
		rs = append(rs,
			row{"get 256 B" + what, "request", clients, openGet},
			row{"put 256 B" + what, "request", clients, openPut},
			row{"Kubernetes Txn 1 KiB" + what, "request", clients, openTxn})
	}
	return append(rs,
		row{fmt.Sprintf("list %d x 1 KiB", cfg.List), "list", 1, openList},
		row{fmt.Sprintf("watch, %d watchers", cfg.Watchers), "event", 1, openWatch})
}

// value is the plaintext of a key: of its own, so that a mix-up shows.
func value(key string, size int) []byte {
	return bytes.Repeat([]byte(key+"|"), size/(len(key)+1)+1)[:size]
}

func (s *subject) getKey(i int) string  { return fmt.Sprintf("%sget/%05d", s.prefix, i%getKeys) }
func (s *subject) listKey(i int) string { return fmt.Sprintf("%slist/%07d", s.prefix, i) }
func (s *subject) watchKey() string     { return s.prefix + "watch/key" }

// fill writes what the rows read, through the subject.
func (b *bed) fill(ctx context.Context, s *subject) error {
	c, err := dial(s.endpoint)
	if err != nil {
		return err
	}
	defer c.Close()
	total := getKeys + b.cfg.List + 1
	var next atomic.Int64
	err = together(64, func(int) error {
		for {
			i := int(next.Add(1)) - 1
			if i >= total {
				return nil
			}
			key, size := s.watchKey(), largeValue
			switch {
			case i < getKeys:
				key, size = s.getKey(i), smallValue
			case i < getKeys+b.cfg.List:
				key = s.listKey(i - getKeys)
			}
			if _, err := c.Put(ctx, key, string(value(key, size))); err != nil {
				return fmt.Errorf("fill through %s: %w", s.name, err)
			}
		}
	})
	if err != nil {
		return err
	}
	// What is measured must be what its name says.
	stored, err := b.direct.Get(ctx, s.watchKey())
	if err != nil {
		return err
	}
	if sealed := bytes.HasPrefix(stored.Kvs[0].Value, []byte("k8s:enc:kms:v2:bench:")); sealed != (s.name == sealing) {
		return fmt.Errorf("fill through %s: the stored values' being sealed is %v", s.name, sealed)
	}
	return nil
}

// connect makes the connections that a row's clients share.
func (b *bed) connect(s *subject, clients int) ([]*clientv3.Client, func(), error) {
	var cs []*clientv3.Client
	closeAll := func() {
		for _, c := range cs {
			c.Close()
		}
	}
	for range min(b.cfg.Conns, clients) {
		c, err := dial(s.endpoint)
		if err != nil {
			closeAll()
			return nil, nil, err
		}
		cs = append(cs, c)
	}
	return cs, closeAll, nil
}

func openGet(_ context.Context, b *bed, s *subject, clients int) (*workload, error) {
	cs, closeAll, err := b.connect(s, clients)
	if err != nil {
		return nil, err
	}
	keys, want := make([]string, getKeys), make([][]byte, getKeys)
	for i := range keys {
		keys[i] = s.getKey(i)
		want[i] = value(keys[i], smallValue)
	}
	next := make([]int, clients)
	return &workload{close: closeAll, do: func(ctx context.Context, client int) (int, error) {
		next[client]++
		i := (client*17 + next[client]) % getKeys
		r, err := cs[client%len(cs)].Get(ctx, keys[i])
		if err == nil && (len(r.Kvs) != 1 || !bytes.Equal(r.Kvs[0].Value, want[i])) {
			err = errors.New("the answer is not the value that was put")
		}
		return 1, err
	}}, nil
}

func openPut(_ context.Context, b *bed, s *subject, clients int) (*workload, error) {
	cs, closeAll, err := b.connect(s, clients)
	if err != nil {
		return nil, err
	}
	keys, values := make([]string, clients), make([]string, clients)
	for i := range keys {
		keys[i] = fmt.Sprintf("%sput/%03d", s.prefix, i)
		values[i] = string(value(keys[i], smallValue))
	}
	return &workload{close: closeAll, do: func(ctx context.Context, client int) (int, error) {
		_, err := cs[client%len(cs)].Put(ctx, keys[client], values[client])
		return 1, err
	}}, nil
}

// openTxn updates as kube-apiserver does: put if the revision is the one last seen, else get.
func openTxn(ctx context.Context, b *bed, s *subject, clients int) (*workload, error) {
	cs, closeAll, err := b.connect(s, clients)
	if err != nil {
		return nil, err
	}
	keys, values, revs := make([]string, clients), make([]string, clients), make([]int64, clients)
	for i := range keys {
		keys[i] = fmt.Sprintf("%stxn/%03d", s.prefix, i)
		values[i] = string(value(keys[i], largeValue))
		have, err := cs[0].Get(ctx, keys[i], clientv3.WithKeysOnly())
		if err != nil {
			closeAll()
			return nil, err
		}
		if len(have.Kvs) == 1 {
			revs[i] = have.Kvs[0].ModRevision
		}
	}
	return &workload{close: closeAll, do: func(ctx context.Context, client int) (int, error) {
		key := keys[client]
		r, err := cs[client%len(cs)].Txn(ctx).If(clientv3.Compare(clientv3.ModRevision(key), "=", revs[client])).
			Then(clientv3.OpPut(key, values[client])).Else(clientv3.OpGet(key)).Commit()
		if err != nil {
			return 0, err
		}
		if !r.Succeeded {
			return 0, errors.New("the transaction's compare failed, although nobody else writes")
		}
		revs[client] = r.Header.Revision
		return 1, nil
	}}, nil
}

// openList reads everything below a prefix in one unlimited range.
func openList(_ context.Context, b *bed, s *subject, clients int) (*workload, error) {
	cs, closeAll, err := b.connect(s, clients)
	if err != nil {
		return nil, err
	}
	first := value(s.listKey(0), largeValue)
	return &workload{close: closeAll, do: func(ctx context.Context, client int) (int, error) {
		r, err := cs[client].Get(ctx, s.prefix+"list/", clientv3.WithPrefix())
		if err != nil {
			return 0, err
		}
		if len(r.Kvs) != b.cfg.List || !bytes.Equal(r.Kvs[0].Value, first) || len(r.Kvs[b.cfg.List-1].Value) != largeValue {
			return 0, errors.New("the list is not what was put")
		}
		return 1, nil
	}}, nil
}

// watchStreams is how many streams the watchers share: kube-apiserver has about that many.
const watchStreams = 50

// openWatch has all watchers watch one key. An operation is one write, which goes round the subject as stored bytes, until every watcher
// has its event.
func openWatch(ctx context.Context, b *bed, s *subject, _ int) (_ *workload, err error) {
	ctx, cancel := context.WithCancel(ctx)
	cs, closeAll, err := b.connect(s, 1)
	if err != nil {
		cancel()
		return nil, err
	}
	w := &watchers{all: make(chan struct{}, 1), failed: make(chan error, watchStreams), done: make(chan struct{}, watchStreams),
		want: value(s.watchKey(), largeValue), total: int64(b.cfg.Watchers)}
	stop := func() {
		cancel()
		for range w.streams {
			<-w.done
		}
		closeAll()
	}
	defer func() {
		if err != nil {
			stop()
		}
	}()
	have, err := b.direct.Get(ctx, s.watchKey())
	if err != nil {
		return nil, err
	}
	stored := string(have.Kvs[0].Value)
	for i := range min(watchStreams, b.cfg.Watchers) {
		n := (b.cfg.Watchers-i-1)/watchStreams + 1
		if err := w.open(ctx, cs[0], s.watchKey(), i, n); err != nil {
			return nil, err
		}
	}
	return &workload{close: stop, do: func(ctx context.Context, _ int) (int, error) {
		if _, err := b.direct.Put(ctx, s.watchKey(), stored); err != nil {
			return 0, err
		}
		select {
		case <-w.all:
			return b.cfg.Watchers, nil
		case err := <-w.failed:
			return 0, err
		case <-time.After(10 * time.Second):
			return 0, fmt.Errorf("%d of %d events have come after 10 s", w.received.Load(), w.total)
		}
	}}, nil
}

// watchers count the events of all streams.
type watchers struct {
	total    int64
	want     []byte
	streams  int
	received atomic.Int64
	all      chan struct{} // gets one when every watcher has its event
	failed   chan error
	done     chan struct{} // gets one for each stream that has ended
}

// open makes a stream with n watchers on it and waits until etcd has made them.
func (w *watchers) open(ctx context.Context, c *clientv3.Client, key string, id, n int) error {
	// The metadata is what tells streams apart for a client that shares them; here it only labels.
	stream, err := pb.NewWatchClient(c.ActiveConnection()).Watch(metadata.AppendToOutgoingContext(ctx, "stream", fmt.Sprint(id)))
	if err != nil {
		return fmt.Errorf("open watch stream: %w", err)
	}
	for range n {
		err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte(key)}}})
		if err != nil {
			return fmt.Errorf("create watcher: %w", err)
		}
	}
	for range n {
		r, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("create watcher: %w", err)
		}
		if !r.Created || r.Canceled {
			return errors.New("create watcher: the answer does not say created")
		}
	}
	w.streams++
	go func() {
		defer func() { w.done <- struct{}{} }()
		for {
			r, err := stream.Recv()
			if err != nil {
				if ctx.Err() == nil {
					w.failed <- fmt.Errorf("watch: %w", err)
				}
				return
			}
			for _, e := range r.Events {
				if !bytes.Equal(e.Kv.Value, w.want) {
					w.failed <- errors.New("watch: the event's value is not the one that was put")
					return
				}
			}
			if n := w.received.Add(int64(len(r.Events))); len(r.Events) > 0 && n%w.total == 0 {
				w.all <- struct{}{}
			}
		}
	}()
	return nil
}
