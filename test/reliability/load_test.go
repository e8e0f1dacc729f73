package reliability

import (
	"context"
	"fmt"
	"math/rand/v2"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.uber.org/zap"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	clients  = 8
	watchers = 2
	patience = 3 * time.Second       // for one response
	pace     = 40 * time.Millisecond // between two requests of a client
	turn     = 5 * time.Second       // how long a set of registers is used, so that histories stay short
)

// load is the clients of one period, and what they learn. Each client uses one proxy, and sends
// each request once. Each watch uses both.
type load struct {
	s       *site
	base    string // prefix of all keys
	history *history
	clients []*client
	working sync.WaitGroup
	ending  atomic.Bool
	// patience is how long the last events may take.
	patience time.Duration

	mu       sync.Mutex
	counters [2]increments
	once     map[string]string // value of each key that is written once
	acked    map[string]bool
	watches  [watchers]*watch
}

type increments struct{ known, unknown int }

// client is one connection to one proxy.
type client struct {
	*load
	id, n         int
	kv            pb.KVClient
	reads, writes atomic.Int64 // with a response
	failure       atomic.Value // text of the last error
	known         map[string]string
}

// watch is what one watch received of the keys that are written once.
type watch struct {
	revision int64
	events   map[string][]string
}

func newLoad(s *site, base string) *load {
	l := &load{s: s, base: base, patience: within, history: newHistory(), once: make(map[string]string), acked: make(map[string]bool)}
	for id := range clients {
		conn := harness.Dial(s.t, s.clientLinks[id%2].Address, nil)
		l.clients = append(l.clients, &client{load: l, id: id, kv: pb.NewKVClient(conn), known: make(map[string]string)})
	}
	return l
}

func (l *load) start(ctx context.Context) {
	l.s.t.Helper()
	kv, done := l.s.kv(0)
	defer done()
	for n := range l.counters {
		key, value := l.counter(n), l.s.Sealed.Value("0")
		call := l.history.now()
		l.s.write(0, key, value)
		l.history.add(record{client: clients, key: key, in: put{value}, call: call, wrote: value})
	}
	now, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte(l.counter(0))})
	if err != nil {
		l.s.t.Fatal(err)
	}
	for n := range l.watches {
		l.watches[n] = &watch{revision: now.Header.Revision, events: make(map[string][]string)}
		l.working.Go(func() { l.watch(ctx, l.watches[n]) })
	}
	for _, c := range l.clients {
		l.working.Go(func() { c.work(ctx) })
	}
}

func (l *load) counter(n int) string { return fmt.Sprintf("%scounter-%d", l.base, n) }

// watch receives the events of the keys that are written once, and continues after interruptions.
func (l *load) watch(ctx context.Context, w *watch) {
	c, err := clientv3.New(clientv3.Config{
		Endpoints: []string{"http://" + l.s.clientLinks[0].Address, "http://" + l.s.clientLinks[1].Address}, Logger: zap.NewNop(),
		DialKeepAliveTime: 2 * time.Second, DialKeepAliveTimeout: 2 * time.Second,
		DialOptions: append(harness.SearchErrors(), grpc.WithConnectParams(grpc.ConnectParams{
			MinConnectTimeout: time.Second, Backoff: backoff.Config{BaseDelay: 20 * time.Millisecond, Multiplier: 1.5, MaxDelay: 200 * time.Millisecond},
		})),
	})
	if err != nil {
		l.s.t.Error(err)
		return
	}
	defer c.Close()
	for ctx.Err() == nil {
		l.mu.Lock()
		from := w.revision + 1
		l.mu.Unlock()
		for r := range c.Watch(clientv3.WithRequireLeader(ctx), l.base+"once/", clientv3.WithPrefix(), clientv3.WithRev(from), clientv3.WithProgressNotify()) {
			if r.CompactRevision != 0 {
				l.s.t.Errorf("a watch from revision %d is too late: etcd was compacted at %d", from, r.CompactRevision)
				return
			}
			l.mu.Lock()
			for _, e := range r.Events {
				key := string(e.Kv.Key)
				w.events[key] = append(w.events[key], string(e.Kv.Value))
				w.revision = e.Kv.ModRevision
			}
			l.mu.Unlock()
		}
		pause(ctx, 50*time.Millisecond)
	}
}

// seen returns the revision that every watch has seen.
func (l *load) seen() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	least := l.watches[0].revision
	for _, w := range l.watches {
		least = min(least, w.revision)
	}
	return least
}

func (c *client) work(ctx context.Context) {
	for !c.ending.Load() && ctx.Err() == nil {
		if err := c.one(); err != nil {
			c.failure.Store(err.Error())
		}
		pause(ctx, pace/2+time.Duration(rand.Int64N(int64(pace))))
	}
}

// one is one operation. Its deadline does not depend on the end of the period: otherwise the result
// of all requests in flight would be unknown.
func (c *client) one() error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(c.s.t.Context()), patience)
	defer cancel()
	c.n++
	key := fmt.Sprintf("%sregister-%d-%d", c.base, int(time.Since(c.history.begun)/turn), rand.IntN(3))
	value := c.s.Sealed.Value(fmt.Sprintf("%d-%d-%d", c.s.periods, c.id, c.n))
	old := c.known[key]
	delete(c.known, key)
	switch kind := c.n % 6; {
	case kind == 0:
		return c.increment(ctx)
	case kind == 1:
		return c.writeOnce(ctx, value)
	case kind == 2:
		return c.put(ctx, key, value)
	case kind == 3 && old != "": // a compare with an absent key fails
		_, now, err := c.swap(ctx, key, old, value)
		c.known[key] = now
		return err
	default:
		now, err := c.get(ctx, key)
		if err == nil {
			c.known[key] = now
		}
		return err
	}
}

func (c *client) get(ctx context.Context, key string) (string, error) {
	r := record{client: c.id, key: key, call: c.history.now()}
	got, err := c.kv.Range(ctx, &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		c.history.failed()
		return "", err
	}
	if len(got.Kvs) > 0 {
		r.saw = string(got.Kvs[0].Value)
	}
	r.in = get{r.saw}
	c.history.add(r)
	c.reads.Add(1)
	return r.saw, nil
}

func (c *client) put(ctx context.Context, key, value string) error {
	r := record{client: c.id, key: key, call: c.history.now(), in: put{value}, wrote: value}
	_, err := c.kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value)})
	r.unknown = err != nil
	c.history.add(r)
	if err == nil {
		c.writes.Add(1)
	}
	return err
}

// writeOnce writes a key of its own, so that its version shows whether it was applied twice.
func (c *client) writeOnce(ctx context.Context, value string) error {
	key := fmt.Sprintf("%sonce/%d-%d", c.base, c.id, c.n)
	c.mu.Lock()
	c.once[key] = value
	c.mu.Unlock()
	_, err := c.kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value)})
	if err != nil {
		c.history.failed()
		return err
	}
	c.mu.Lock()
	c.acked[key] = true
	c.mu.Unlock()
	c.writes.Add(1)
	return nil
}

// swap writes a value if the key has the old one, by a compare of plaintext.
func (c *client) swap(ctx context.Context, key, old, value string) (swapped bool, now string, err error) {
	k := []byte(key)
	r := record{client: c.id, key: key, call: c.history.now(), in: swap{old, value}, wrote: value, saw: old}
	got, err := c.kv.Txn(ctx, &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: k, Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: []byte(old)}}},
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: k, Value: []byte(value)}}}},
		Failure: []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: k}}}},
	})
	r.unknown, now = err != nil, value
	if err == nil && !got.Succeeded {
		now = ""
		if kvs := got.Responses[0].GetResponseRange().GetKvs(); len(kvs) > 0 {
			now = string(kvs[0].Value)
		}
		r.in, r.wrote, r.saw = kept{old, now}, "", now
	}
	c.history.add(r)
	if err != nil {
		return false, "", err
	}
	c.writes.Add(1)
	return r.wrote != "", now, nil
}

// increment increments a counter once, unless another client is faster.
func (c *client) increment(ctx context.Context) error {
	n := c.id / 2 % len(c.counters) // through both proxies
	key := c.counter(n)
	old, err := c.get(ctx, key)
	if err != nil {
		return err
	}
	swapped, _, err := c.swap(ctx, key, old, c.s.Sealed.Value(fmt.Sprintf("%d by %d-%d", c.s.number(old)+1, c.id, c.n)))
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil {
		c.counters[n].unknown++
	} else if swapped {
		c.counters[n].known++
	}
	return err
}

// number returns the number in a counter's value; the rest of the value shows who wrote it.
func (s *site) number(value string) int {
	n, _, _ := strings.Cut(strings.TrimPrefix(value, s.Sealed.Value("")), " ")
	i, err := strconv.Atoi(n)
	if err != nil {
		return -1
	}
	return i
}

// proceed waits until each client has had a response to a read and to a write since now.
func (l *load) proceed(fault string) {
	l.s.t.Helper()
	reads, writes := make([]int64, clients), make([]int64, clients)
	for id, c := range l.clients {
		reads[id], writes[id] = c.reads.Load(), c.writes.Load()
	}
	harness.Eventually(l.s.t, within, "every client to continue after: "+fault, func() error {
		for id, c := range l.clients {
			if c.reads.Load() == reads[id] || c.writes.Load() == writes[id] {
				return fmt.Errorf("client %d has no response; its last error: %v", id, c.failure.Load())
			}
		}
		return nil
	})
}

// check ends the clients, and compares what they learned with what etcd has.
func (l *load) check(cancel func()) string {
	s := l.s
	s.t.Helper()
	l.ending.Store(true)
	ended := make(chan struct{})
	var stopped sync.Once
	defer stopped.Do(cancel)
	l.await()
	stopped.Do(cancel)
	go func() { l.working.Wait(); close(ended) }()
	select {
	case <-ended:
	case <-time.After(within):
		s.t.Fatal("the clients do not end")
	}
	twice, events := 0, 0
	for n, w := range l.watches {
		for key, values := range w.events {
			events += len(values)
			if len(values) > 1 {
				twice++
				s.report.bad(&s.report.EventsTwice, fmt.Sprintf("watch %d: %s was received %d times", n, key, len(values)))
			}
			for _, value := range values {
				if value != l.once[key] {
					s.report.wrong(fmt.Sprintf("watch %d: an event of %s has a value that was not written", n, key))
				}
			}
		}
		for key := range l.acked {
			if len(w.events[key]) == 0 {
				s.report.bad(&s.report.EventsLost, fmt.Sprintf("watch %d: no event of %s", n, key))
			}
		}
	}
	have := s.list(rand.IntN(2), l.base+"once/")
	for key := range l.acked {
		if _, ok := have[key]; !ok {
			s.report.lost(key + " was acknowledged, and is not there")
		}
	}
	for key, got := range have {
		if got.value != l.once[key] {
			s.report.wrong(key + " has a value that was not written")
		}
		if got.version != 1 {
			s.report.doubled(fmt.Sprintf("%s was written once, and has version %d", key, got.version))
		}
	}
	for n, done := range l.counters {
		last := &client{load: l, id: clients}
		var put func()
		last.kv, put = s.kv(n)
		var value string
		harness.Eventually(s.t, within, "a counter's last value", func() (err error) {
			ctx, cancel := context.WithTimeout(s.t.Context(), patience)
			defer cancel()
			value, err = last.get(ctx, l.counter(n))
			return err
		})
		put()
		switch got := s.number(value); {
		case got < done.known:
			s.report.lost(fmt.Sprintf("a counter was incremented %d times, and is %d", done.known, got))
		case got > done.known+done.unknown:
			s.report.doubled(fmt.Sprintf("a counter was incremented %d times and %d times without a response, and is %d", done.known, done.unknown, got))
		}
	}
	s.encrypted(l.base)
	checked, registers := l.history.check(s)
	s.report.Operations += len(l.history.records) - l.history.unknown + len(l.acked)
	s.report.Unknown += l.history.unknown + l.history.errors
	s.report.Checked += checked
	s.report.Registers += registers
	s.report.Writes += len(l.acked)
	s.report.Events += events
	s.delete(l.base)
	return fmt.Sprintf("%d operations on %d registers, %d keys written once, %d events, %d requests without a response", checked, registers, len(l.acked), events, l.history.unknown+l.history.errors)
}

// await waits until each watch has an event of each acknowledged write, or for as long as anything
// may take.
func (l *load) await() {
	time.Sleep(patience) // of the last requests
	for end := time.Now().Add(l.patience); time.Now().Before(end); time.Sleep(100 * time.Millisecond) {
		l.mu.Lock()
		missing := 0
		for key := range l.acked {
			for _, w := range l.watches {
				if len(w.events[key]) == 0 {
					missing++
				}
			}
		}
		l.mu.Unlock()
		if missing == 0 {
			return
		}
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}
