package reencrypt

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const counters = 20

// counter is a key that sorts after those of fill: when reencrypt gets to it, clients have written
// it since it was read.
func counter(n int) string { return fmt.Sprintf("%sz-counter-%02d", prefix, n) }

// TestBesideClients re-encrypts everything after one rotation after the other, while clients of the
// proxy increment numbers under optimistic locks, and watch. No update may be lost or applied
// twice. Each watch must see each change once, in order, and each re-encryption as a change to the
// same value.
func TestBesideClients(t *testing.T) {
	t.Parallel()
	for _, txnKeys := range []string{"1", "50"} {
		t.Run(txnKeys, func(t *testing.T) {
			t.Parallel()
			testBesideClients(t, txnKeys)
		})
	}
}

func testBesideClients(t *testing.T, txnKeys string) {
	s, _ := newSite(t, harness.EtcdConfig{})
	values := s.fill(200)
	for n := range counters {
		s.put(counter(n), []byte("0"), 0)
	}
	p := s.StartProxy("proxy", s.cfg)
	p.WaitReady(within)
	through := harness.Dial(t, p.Address, nil)
	kv := pb.NewKVClient(through)
	w := s.watch(t, pb.NewWatchClient(through), counter(0))

	ctx, stop := context.WithCancel(t.Context())
	var all sync.WaitGroup
	var made [counters]atomic.Int64
	for range 6 {
		all.Go(func() {
			for ctx.Err() == nil {
				n := rand.IntN(counters)
				done, err := countUp(t.Context(), kv, counter(n))
				if err != nil {
					t.Error(err)
					return
				}
				made[n].Add(done)
			}
		})
	}
	config := s.config("run", s.cfg)
	raced := int64(0)
	const rounds = 4
	for round := range rounds {
		if round > 0 {
			s.kms.Rotate() // which the proxy notices a moment later
		}
		r, out := s.reencrypt(config, 0, "--txn-keys", txnKeys, "--workers", "4", "--rate", "400")
		if r.Rewritten < int64(len(values)) {
			t.Errorf("round %d: %s", round, out)
		}
		raced += r.Raced
	}
	stop()
	all.Wait()
	t.Logf("%d times a client was faster", raced)
	if raced == 0 {
		t.Error("no client was ever faster: nothing was proven")
	}

	updates := int64(0)
	for n := range counters {
		got := get(t, kv, counter(n))
		if string(got.Value) != strconv.FormatInt(made[n].Load(), 10) {
			t.Errorf("%s is %s after %d updates", counter(n), got.Value, made[n].Load())
		}
		updates += made[n].Load()
	}
	if updates < 100 {
		t.Errorf("only %d updates: the clients were held up", updates)
	}
	last := get(t, kv, counter(0))
	end, err := kv.Put(t.Context(), &pb.PutRequest{Key: last.Key, Value: []byte("end")})
	if err != nil {
		t.Fatal(err)
	}
	w.check(values, end.Header.Revision)
}

// countUp adds one if no other client does so at the same time, and returns what it added.
func countUp(ctx context.Context, kv pb.KVClient, key string) (int64, error) {
	now, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		return 0, err
	}
	value, err := strconv.Atoi(string(now.Kvs[0].Value))
	if err != nil {
		return 0, err
	}
	answer, err := kv.Txn(ctx, &pb.TxnRequest{
		Compare: []*pb.Compare{{
			Key: []byte(key), Target: pb.Compare_MOD, Result: pb.Compare_EQUAL, TargetUnion: &pb.Compare_ModRevision{ModRevision: now.Kvs[0].ModRevision},
		}},
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key), Value: []byte(strconv.Itoa(value + 1))}}}},
	})
	if err != nil || !answer.Succeeded {
		return 0, err
	}
	return 1, nil
}

// watched is what a watch through the proxy received.
type watched struct {
	t      *testing.T
	events chan *pb.WatchResponse
}

func (s *site) watch(t *testing.T, c pb.WatchClient, ready string) *watched {
	t.Helper()
	stream, err := c.Watch(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	create := &pb.WatchCreateRequest{Key: []byte(prefix), RangeEnd: []byte("/sealed0")}
	if err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: create}}); err != nil {
		t.Fatal(err)
	}
	if r, err := stream.Recv(); err != nil || !r.Created {
		t.Fatalf("watch %s: %v, %v", ready, r, err)
	}
	w := &watched{t: t, events: make(chan *pb.WatchResponse, 100_000)}
	go func() {
		defer close(w.events)
		for {
			r, err := stream.Recv()
			if err != nil {
				if !errors.Is(err, io.EOF) && t.Context().Err() == nil {
					t.Errorf("watch: %v", err)
				}
				return
			}
			w.events <- r
		}
	}()
	return w
}

// check checks the events up to a revision: a counter's next value is the same or one more, and
// other values do not change.
func (w *watched) check(values map[string][]byte, end int64) {
	t := w.t
	last, counts, at := make(map[string]int64), make(map[string]int), int64(0)
	for timeout := time.After(within); ; {
		var r *pb.WatchResponse
		select {
		case r = <-w.events:
		case <-timeout:
			t.Fatalf("the watch is at revision %d of %d", at, end)
		}
		for _, e := range r.Events {
			key, value := string(e.Kv.Key), string(e.Kv.Value)
			if e.Kv.ModRevision < at || e.Kv.ModRevision <= last[key] {
				t.Errorf("%s at revision %d after %d and %d", key, e.Kv.ModRevision, at, last[key])
			}
			at, last[key] = e.Kv.ModRevision, e.Kv.ModRevision
			want, fixed := values[key]
			switch {
			case at == end:
				return
			case fixed && value != string(want):
				t.Errorf("%s changed", key)
			case !fixed:
				n, err := strconv.Atoi(value)
				if err != nil || n < counts[key] || n > counts[key]+1 {
					t.Errorf("%s is %q after %d", key, value, counts[key])
				}
				counts[key] = n
			}
		}
	}
}
