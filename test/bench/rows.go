package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
)

// Sizes of the values, in bytes.
const (
	smallValue = 256
	largeValue = 1024
)

const (
	getKeys = 1000 // keys that the gets choose from
	// coldLists: lists that the cold row reads in turn: more values than the proxy keeps ciphers
	// for
	coldLists = 4
)

// row is one line of the report.
type row struct {
	name    string
	unit    string // what CPU time and throughput are counted by
	clients int
	secure  bool // over TLS
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
	count := func(n int) string {
		if n == 1 {
			return ", 1 client"
		}
		return fmt.Sprintf(", %d clients", n)
	}
	var rs []row
	for _, n := range []int{1, 64} {
		rs = append(rs,
			row{"get 256 B" + count(n), "request", n, false, openGet},
			row{"put 256 B" + count(n), "request", n, false, openPut},
			row{"Kubernetes Txn 1 KiB" + count(n), "request", n, false, openTxn})
	}
	rs = append(rs,
		row{"mixed Kubernetes load" + count(64), "request", 64, false, openMixed},
		row{fmt.Sprintf("list %d x 1 KiB", cfg.List), "list", 1, false, openList},
		row{fmt.Sprintf("list %d x 1 KiB, cold", cfg.List), "list", 1, false, openColdList},
		row{fmt.Sprintf("list %d x 1 MiB", cfg.Large), "list", 1, false, openLargeList},
		row{fmt.Sprintf("watch, %d watchers of one key", cfg.Watchers), "event", 1, false, openWatch},
		row{fmt.Sprintf("watch, %d watchers of as many keys", cfg.Many), "event", 1, false, openManyWatch})
	for _, n := range []int{1, 64} {
		rs = append(rs, row{"TLS: get 256 B" + count(n), "request", n, true, openGet})
	}
	return append(rs,
		row{"TLS: put 256 B" + count(64), "request", 64, true, openPut},
		row{fmt.Sprintf("TLS: list %d x 1 KiB", cfg.List), "list", 1, true, openList})
}

// value is the plaintext of a key: of its own, so that a mix-up shows.
func value(key string, size int) []byte {
	return bytes.Repeat([]byte(key+"|"), size/(len(key)+1)+1)[:size]
}

func (s *subject) getKey(i int) string  { return fmt.Sprintf("%sget/%05d", s.prefix, i%getKeys) }
func (s *subject) listKey(i int) string { return fmt.Sprintf("%slist/%07d", s.prefix, i) }
func (s *subject) watchKey() string     { return s.prefix + "watch/key" }
func (s *subject) manyKey(i int) string { return fmt.Sprintf("%smany/%05d", s.prefix, i) }
func (s *subject) coldPrefix(n int) string {
	return fmt.Sprintf("%scold/%d/", s.prefix, n)
}

// fill writes what the chosen rows read, through the subject.
func (b *bed) fill(ctx context.Context, s *subject, chosen []row) error {
	c, err := dial(s.endpoint, s.tls)
	if err != nil {
		return err
	}
	defer c.Close()
	needs := func(part string) bool {
		return slices.ContainsFunc(chosen, func(r row) bool { return strings.Contains(r.name, part) })
	}
	type entry struct {
		key  string
		size int
	}
	all := []entry{{s.watchKey(), largeValue}}
	for i := range getKeys {
		all = append(all, entry{s.getKey(i), smallValue})
	}
	for i := range b.cfg.List {
		all = append(all, entry{s.listKey(i), largeValue})
		for n := range coldLists {
			if needs("cold") {
				all = append(all, entry{fmt.Sprintf("%s%07d", s.coldPrefix(n), i), largeValue})
			}
		}
	}
	for i := range b.cfg.Large {
		if needs("1 MiB") {
			all = append(all, entry{fmt.Sprintf("%slarge/%03d", s.prefix, i), 1 << 20})
		}
	}
	for i := range b.cfg.Many {
		if needs("as many keys") {
			all = append(all, entry{s.manyKey(i), largeValue})
		}
	}
	var next atomic.Int64
	err = together(64, func(int) error {
		for {
			i := int(next.Add(1)) - 1
			if i >= len(all) {
				return nil
			}
			if _, err := c.Put(ctx, all[i].key, string(value(all[i].key, all[i].size))); err != nil {
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
	if encrypted := bytes.HasPrefix(stored.Kvs[0].Value, []byte("k8s:enc:kms:v2:bench:")); encrypted != encrypts(s.name) {
		return fmt.Errorf("fill through %s: the stored values are encrypted: %v", s.name, encrypted)
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
		c, err := dial(s.endpoint, s.tls)
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

// openMixed is the load of an API server in proportion: 60 % gets, 25 % updates, 10 % pages of a
// list, 5 % puts.
func openMixed(ctx context.Context, b *bed, s *subject, clients int) (*workload, error) {
	var parts []*workload
	closeAll := func() {
		for _, w := range parts {
			w.close()
		}
	}
	for _, open := range []func(context.Context, *bed, *subject, int) (*workload, error){openGet, openTxn, openPage, openPut} {
		w, err := open(ctx, b, s, clients)
		if err != nil {
			closeAll()
			return nil, err
		}
		parts = append(parts, w)
	}
	shares := []int{12, 17, 19, 20} // of 20, cumulated
	turn := make([]int, clients)
	return &workload{close: closeAll, do: func(ctx context.Context, client int) (int, error) {
		turn[client]++
		// 7 and 20 have no common factor, so each turn comes up
		at := (turn[client]*7 + client) % 20
		part := slices.IndexFunc(shares, func(share int) bool { return at < share })
		return parts[part].do(ctx, client)
	}}, nil
}

// openPage reads one page of 10 values out of a list.
func openPage(_ context.Context, b *bed, s *subject, clients int) (*workload, error) {
	cs, closeAll, err := b.connect(s, clients)
	if err != nil {
		return nil, err
	}
	const limit = 10
	next := make([]int, clients)
	return &workload{close: closeAll, do: func(ctx context.Context, client int) (int, error) {
		next[client]++
		first := s.listKey((client*101 + next[client]*limit) % (b.cfg.List - limit))
		r, err := cs[client%len(cs)].Get(ctx, first, clientv3.WithRange(clientv3.GetPrefixRangeEnd(s.prefix+"list/")), clientv3.WithLimit(limit))
		if err == nil && (len(r.Kvs) != limit || !bytes.Equal(r.Kvs[0].Value, value(first, largeValue))) {
			err = errors.New("the page is not what was put")
		}
		return 1, err
	}}, nil
}

// openList reads everything below a prefix in one unlimited range.
func openList(_ context.Context, b *bed, s *subject, clients int) (*workload, error) {
	return openRange(b, s, clients, b.cfg.List, largeValue, func(int) string { return s.prefix + "list/" })
}

// openColdList reads lists in turn, so that none is read again before its ciphers are forgotten.
func openColdList(_ context.Context, b *bed, s *subject, clients int) (*workload, error) {
	return openRange(b, s, clients, b.cfg.List, largeValue, func(turn int) string { return s.coldPrefix(turn % coldLists) })
}

// openLargeList reads few large values in one range.
func openLargeList(_ context.Context, b *bed, s *subject, clients int) (*workload, error) {
	return openRange(b, s, clients, b.cfg.Large, 1<<20, func(int) string { return s.prefix + "large/" })
}

func openRange(b *bed, s *subject, clients, count, size int, prefix func(turn int) string) (*workload, error) {
	cs, closeAll, err := b.connect(s, clients)
	if err != nil {
		return nil, err
	}
	turn := make([]int, clients)
	return &workload{close: closeAll, do: func(ctx context.Context, client int) (int, error) {
		turn[client]++
		r, err := cs[client%len(cs)].Get(ctx, prefix(turn[client]), clientv3.WithPrefix())
		if err != nil {
			return 0, err
		}
		if len(r.Kvs) != count || len(r.Kvs[count-1].Value) != size ||
			!bytes.Equal(r.Kvs[0].Value, value(string(r.Kvs[0].Key), size)) {
			return 0, errors.New("the list is not what was put")
		}
		return 1, nil
	}}, nil
}

// openWatch has all watchers watch one key. An operation is one write, which goes past the subject
// as stored bytes, until every watcher has its event.
func openWatch(ctx context.Context, b *bed, s *subject, _ int) (*workload, error) {
	return openWatchers(ctx, b, s, b.cfg.Watchers, func(int) string { return s.watchKey() })
}

// openManyWatch has each watcher watch a key of its own. An operation is one transaction that
// writes 100 keys.
func openManyWatch(ctx context.Context, b *bed, s *subject, _ int) (*workload, error) {
	return openWatchers(ctx, b, s, b.cfg.Many, s.manyKey)
}

// openWatchers opens n watchers, on the key that keyOf says for each.
func openWatchers(ctx context.Context, b *bed, s *subject, n int, keyOf func(i int) string) (_ *workload, err error) {
	ctx, cancel := context.WithCancel(ctx)
	cs, closeAll, err := b.connect(s, 1)
	if err != nil {
		cancel()
		return nil, err
	}
	one := keyOf(0) == keyOf(1)
	w := &watchers{all: make(chan struct{}, 1), failed: make(chan error, watchStreams), done: make(chan struct{}, watchStreams)}
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
	for i := range min(watchStreams, n) {
		var keys []string
		for j := i; j < n; j += watchStreams {
			keys = append(keys, keyOf(j))
		}
		if err := w.open(ctx, cs[0], keys); err != nil {
			return nil, err
		}
	}
	writes := min(100, n) // etcd's limit for a transaction is 128
	if one {
		writes = 1
	}
	events := writes
	if one {
		events = n
	}
	ops := make([]clientv3.Op, n)
	for i := range ops {
		if one && i > 0 {
			ops = ops[:1]
			break
		}
		have, err := b.direct.Get(ctx, keyOf(i))
		if err != nil {
			return nil, err
		}
		ops[i] = clientv3.OpPut(keyOf(i), string(have.Kvs[0].Value))
	}
	turn := 0
	return &workload{close: stop, do: func(ctx context.Context, _ int) (int, error) {
		w.expect(int64(events))
		from := turn * writes % len(ops)
		turn++
		if _, err := b.direct.Txn(ctx).Then(ops[from : from+writes]...).Commit(); err != nil {
			return 0, err
		}
		select {
		case <-w.all:
			return events, nil
		case err := <-w.failed:
			return 0, err
		case <-time.After(10 * time.Second):
			return 0, fmt.Errorf("%d of %d events are missing after 10 s", w.missing.Load(), events)
		}
	}}, nil
}

// watchStreams is how many streams the watchers share: kube-apiserver has about that many.
const watchStreams = 50

// watchers count the events of all streams.
type watchers struct {
	streams int
	missing atomic.Int64
	all     chan struct{} // gets one when every watcher has its event
	failed  chan error
	done    chan struct{} // gets one for each stream that has ended
}

// expect sets how many events the next write causes. No event is on its way when it is called.
func (w *watchers) expect(n int64) { w.missing.Store(n) }

// open makes a stream with a watcher for each key and waits until etcd has made them.
func (w *watchers) open(ctx context.Context, c *clientv3.Client, keys []string) error {
	stream, err := pb.NewWatchClient(c.ActiveConnection()).Watch(ctx)
	if err != nil {
		return fmt.Errorf("open watch stream: %w", err)
	}
	for _, key := range keys {
		err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte(key)}}})
		if err != nil {
			return fmt.Errorf("create watcher: %w", err)
		}
	}
	for range keys {
		r, err := stream.Recv()
		if err != nil {
			return fmt.Errorf("create watcher: %w", err)
		}
		if !r.Created || r.Canceled {
			return errors.New("create watcher: the response does not say created")
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
				if !bytes.HasPrefix(e.Kv.Value, append(e.Kv.Key, '|')) || len(e.Kv.Value) != largeValue {
					w.failed <- errors.New("watch: the value of an event is not the one that was put")
					return
				}
			}
			if n := int64(len(r.Events)); n > 0 && w.missing.Add(-n) == 0 {
				w.all <- struct{}{}
			}
		}
	}()
	return nil
}
