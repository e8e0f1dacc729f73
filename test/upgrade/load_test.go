// Package upgrade restarts one of two proxies at a time under load, with the same version and with
// another one. The clients are etcd's own, and have the addresses of both proxies.
package upgrade

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	within   = 60 * time.Second
	patience = 20 * time.Second // for one request
	clients  = 8
	workers  = 6 // of a client
	watchers = 4
	prefix   = "/s/load/"
)

// wanted returns how many requests all workers should send per second: RESTART_RATE, or 2000. A
// slow machine reaches fewer.
func wanted(t *testing.T) int {
	t.Helper()
	text := os.Getenv("RESTART_RATE")
	if text == "" {
		return 2000
	}
	n, err := strconv.Atoi(text)
	if err != nil || n < 1 {
		t.Fatalf("RESTART_RATE: %q is not a number of requests", text)
	}
	return n
}

// written is what a client learned of a write that succeeded.
type written struct {
	revision   int64
	key, value string
}

// event is what a watch received of a write.
type event = written

// load is clients that use keys under a rule. Each key has one writer, which knows what it must
// read.
type load struct {
	t         *testing.T
	marker    string // prefix of every value
	endpoints []string
	clients   []*clientv3.Client // the workers', then one for each watch
	requests  atomic.Int64
	pace      time.Duration // between two requests of a worker
	started   time.Time

	mu       sync.Mutex
	failures map[string]int
	writes   []written
	events   [watchers][]event
}

func newLoad(t *testing.T, e *harness.Env, proxies []*harness.Proxy) *load {
	l := &load{t: t, marker: e.Sealed.Value("load"), failures: make(map[string]int), pace: clients * workers * time.Second / time.Duration(wanted(t))}
	for _, p := range proxies {
		l.endpoints = append(l.endpoints, p.URL())
	}
	for range clients + watchers {
		l.clients = append(l.clients, client(t, l.endpoints...))
	}
	return l
}

// client is etcd's own client, configured as by an application.
func client(t *testing.T, endpoints ...string) *clientv3.Client {
	t.Helper()
	c, err := clientv3.New(clientv3.Config{Endpoints: endpoints, Logger: zap.NewNop(), DialOptions: harness.SearchErrors()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// fail counts failures by their text.
func (l *load) fail(format string, args ...any) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.failures[fmt.Sprintf(format, args...)]++
}

// run sends requests until ctx ends. Requests in flight are finished first.
func (l *load) run(ctx context.Context) {
	var all sync.WaitGroup
	defer all.Wait()
	for n, c := range l.clients[:clients] {
		for w := range workers {
			all.Go(func() { l.work(ctx, c, fmt.Sprintf("%s%d-%d", prefix, n, w)) })
		}
	}
}

// watch starts the watches, and returns when all of them receive new writes. They continue until
// ctx ends.
func (l *load) watch(ctx context.Context) (wait func()) {
	var all, begun sync.WaitGroup
	for n, c := range l.clients[clients:] {
		begun.Add(1)
		all.Go(func() {
			created := false
			for r := range c.Watch(clientv3.WithRequireLeader(ctx), prefix, clientv3.WithPrefix(), clientv3.WithCreatedNotify()) {
				if err := r.Err(); err != nil {
					l.fail("watch: %v", err)
				}
				if r.Created && !created {
					created = true
					begun.Done()
				}
				l.mu.Lock()
				for _, e := range r.Events {
					l.events[n] = append(l.events[n], event{e.Kv.ModRevision, string(e.Kv.Key), string(e.Kv.Value)})
				}
				l.mu.Unlock()
			}
			if ctx.Err() == nil {
				l.fail("a watch ended")
			}
		})
	}
	begun.Wait()
	return all.Wait
}

// work puts, gets, and writes in transactions, one request after the other.
func (l *load) work(ctx context.Context, c *clientv3.Client, key string) {
	pace := time.NewTicker(l.pace)
	defer pace.Stop()
	last, revision := "", int64(0)
	for i := 0; ; i++ {
		select {
		case <-ctx.Done():
			return
		case <-pace.C:
		}
		asking, done := context.WithTimeout(context.WithoutCancel(ctx), patience)
		value := fmt.Sprintf("%s %s %d", l.marker, key, i)
		kind, err := [...]string{"put", "get", "txn", "get"}[i%4], error(nil)
		switch kind {
		case "put":
			var r *clientv3.PutResponse
			if r, err = c.Put(asking, key, value); err == nil {
				last, revision = value, r.Header.Revision
				l.wrote(revision, key, value)
			}
		case "txn":
			var r *clientv3.TxnResponse
			r, err = c.Txn(asking).If(clientv3.Compare(clientv3.ModRevision(key), "=", revision)).Then(clientv3.OpPut(key, value)).Else(clientv3.OpGet(key)).Commit()
			if err == nil && !r.Succeeded {
				l.fail("txn: the key has changed, and nobody else writes it")
				revision = r.Responses[0].GetResponseRange().Kvs[0].ModRevision
			} else if err == nil {
				last, revision = value, r.Header.Revision
				l.wrote(revision, key, value)
			}
		default:
			var r *clientv3.GetResponse
			if r, err = c.Get(asking, key); err == nil && (len(r.Kvs) != 1 || string(r.Kvs[0].Value) != last) {
				l.fail("get: not what was written last")
			}
		}
		done()
		if err != nil {
			l.fail("%s: %v", kind, err)
		}
		l.requests.Add(1)
	}
}

func (l *load) wrote(revision int64, key, value string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.writes = append(l.writes, written{revision, key, value})
}

// proceed waits for n more requests.
func (l *load) proceed(n int64) {
	l.t.Helper()
	target := l.requests.Load() + n
	harness.Eventually(l.t, within, "requests to go on", func() error {
		if have := l.requests.Load(); have < target {
			return fmt.Errorf("%d more are missing", target-have)
		}
		return nil
	})
}

// connected waits until every client has a connection to p again: before that, the other proxy must
// not be stopped.
func (l *load) connected(p *harness.Proxy) {
	l.t.Helper()
	harness.Eventually(l.t, within, "the clients' connections", func() error {
		n := 0
		for line := range strings.Lines(p.Scrape()) {
			if rest, ok := strings.CutPrefix(line, "etcd_kms_proxy_connections{"); ok {
				_, count, _ := strings.Cut(rest, "} ")
				_, _ = fmt.Sscan(count, &n)
			}
		}
		if n < clients+watchers {
			return fmt.Errorf("%d of %d", n, clients+watchers)
		}
		return nil
	})
}

// check compares the results that clients got with etcd's data, and each watch with it.
func (l *load) check(ctx context.Context, etcd *clientv3.Client, stop func()) {
	l.t.Helper()
	took := time.Since(l.started)
	// Writes with a response, in order: no other client writes these keys.
	slices.SortFunc(l.writes, func(a, b written) int { return int(a.revision - b.revision) })
	last := l.writes[len(l.writes)-1].revision
	harness.Eventually(l.t, within, "the last event of each watch", func() error {
		l.mu.Lock()
		defer l.mu.Unlock()
		for n, events := range l.events {
			if len(events) == 0 || events[len(events)-1].revision < last {
				return fmt.Errorf("watch %d has %d events for %d writes", n, len(events), len(l.writes))
			}
		}
		return nil
	})
	stop()
	for n, events := range l.events {
		if !slices.Equal(events, l.writes) {
			l.t.Errorf("watch %d: %s", n, difference(events, l.writes))
		}
	}
	var stored int
	for r := range etcd.Watch(ctx, prefix, clientv3.WithPrefix(), clientv3.WithRev(1)) {
		if err := r.Err(); err != nil {
			l.t.Fatal(err)
		}
		if stored += len(r.Events); r.Events[len(r.Events)-1].Kv.ModRevision >= last {
			break
		}
	}
	if stored != len(l.writes) {
		l.t.Errorf("etcd has %d writes, and the clients were told of %d", stored, len(l.writes))
	}
	for failure, n := range l.failures {
		l.t.Errorf("%d times: %s", n, failure)
	}
	l.t.Logf("%d requests in %v, %.0f a second; %d writes, each seen once by %d watches", l.requests.Load(), took.Round(time.Second), float64(l.requests.Load())/took.Seconds(), len(l.writes), watchers)
}

// difference says where events first differ from writes.
func difference(events, writes []written) string {
	for i := range min(len(events), len(writes)) {
		if events[i] != writes[i] {
			return fmt.Sprintf("%d events for %d writes; event %d is of revision %d of %s, and the write of revision %d of %s", len(events), len(writes),
				i, events[i].revision, events[i].key, writes[i].revision, writes[i].key)
		}
	}
	return fmt.Sprintf("%d events for %d writes", len(events), len(writes))
}
