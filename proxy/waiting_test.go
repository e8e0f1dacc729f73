package proxy

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// starter is startProxy, with calls relayed or handled.
type starter = func(t testing.TB, etcd string, rules []Rule, edit func(*Config)) *running

// bothWays runs a test with calls that are relayed, and with calls that are handled.
func bothWays(t *testing.T, test func(t *testing.T, startProxy starter)) {
	for name, relays := range map[string]bool{"relayed": true, "handled": false} {
		t.Run(name, func(t *testing.T) {
			test(t, func(t testing.TB, etcd string, rules []Rule, edit func(*Config)) *running {
				t.Helper()
				return startRelaying(t, etcd, rules, edit, relays)
			})
		})
	}
}

// slowKMS is a Sealer whose keys with "slow" in them wait for a KMS. It opens where a value stands, as the real one does, so that what is tried in haste and given up is damaged.
type slowKMS struct {
	release chan struct{} // closed when the KMS answers
	waiting chan string   // the keys of those who begin to wait
	left    chan error    // why those went that waited in vain
}

func newSlowKMS() *slowKMS {
	return &slowKMS{release: make(chan struct{}), waiting: make(chan string, 100), left: make(chan error, 100)}
}

func (s *slowKMS) wait(ctx context.Context, key []byte) error {
	if !bytes.Contains(key, []byte("slow")) {
		return nil
	}
	select {
	case <-s.release:
		return nil
	default:
	}
	if err := ctx.Err(); err != nil {
		return err
	}
	s.waiting <- string(key)
	select {
	case <-s.release:
		return nil
	case <-ctx.Done():
		s.left <- context.Cause(ctx)
		return ctx.Err()
	}
}

func (s *slowKMS) Seal(ctx context.Context, key, value []byte) ([]byte, error) {
	if err := s.wait(ctx, key); err != nil {
		return nil, err
	}
	return reverser{}.Seal(ctx, key, value)
}

func (s *slowKMS) Open(ctx context.Context, key, stored []byte) ([]byte, error) {
	if err := s.wait(ctx, key); err != nil {
		return nil, err
	}
	value, err := reverser{}.Open(ctx, key, stored)
	if err != nil {
		return nil, err
	}
	clear(stored)
	return stored[:copy(stored, value)], nil
}

func (s *slowKMS) TrySeal(key, value []byte) ([]byte, error) {
	if !s.Ready(key) {
		return nil, ErrWouldBlock
	}
	return s.Seal(context.Background(), key, value)
}

func (s *slowKMS) TryOpen(key, stored []byte) ([]byte, error) {
	if !s.Ready(key) {
		return nil, ErrWouldBlock
	}
	return s.Open(context.Background(), key, stored)
}

// Ready finds the key in what reverser stores.
func (s *slowKMS) Ready(stored []byte) bool {
	select {
	case <-s.release:
		return true
	default:
		return !bytes.Contains(stored, []byte("slow"))
	}
}

// serveStore starts an etcd that has every key: its value is "v" and the key. A put is answered with the value that came.
func serveStore(t *testing.T, list ...string) string {
	kv := func(key string) *mvccpb.KeyValue {
		return &mvccpb.KeyValue{Key: []byte(key), Value: sealed(key, "v"+key)}
	}
	return serveFake(t, &fakeEtcd{
		rangeFn: func(_ context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
			if len(r.RangeEnd) == 0 {
				return &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{kv(string(r.Key))}}, nil
			}
			resp := &pb.RangeResponse{Count: int64(len(list))}
			for _, k := range list {
				resp.Kvs = append(resp.Kvs, kv(k))
			}
			return resp, nil
		},
		putFn: func(_ context.Context, r *pb.PutRequest) (*pb.PutResponse, error) {
			return &pb.PutResponse{PrevKv: &mvccpb.KeyValue{Key: r.Key, Value: r.Value}}, nil
		},
		streamFn: func(r *pb.RangeRequest, s grpc.ServerStreamingServer[pb.RangeStreamResponse]) error {
			for _, k := range list {
				if err := s.Send(&pb.RangeStreamResponse{RangeResponse: &pb.RangeResponse{Kvs: []*mvccpb.KeyValue{kv(k)}}}); err != nil {
					return err
				}
			}
			return nil
		},
		keepAlive: func(s grpc.BidiStreamingServer[pb.LeaseKeepAliveRequest, pb.LeaseKeepAliveResponse]) error {
			for {
				r, err := s.Recv()
				if err != nil {
					return nil
				}
				if err := s.Send(&pb.LeaseKeepAliveResponse{ID: r.ID, TTL: 1}); err != nil {
					return err
				}
			}
		},
		watchFn: func(s grpc.BidiStreamingServer[pb.WatchRequest, pb.WatchResponse]) error {
			for {
				r, err := s.Recv()
				if err != nil {
					return nil
				}
				key := string(r.GetCreateRequest().GetKey())
				if err := s.Send(&pb.WatchResponse{Events: []*mvccpb.Event{{Kv: kv(key)}}}); err != nil {
					return err
				}
			}
		},
	})
}

// TestNobodyWaitsForAnothersKMS: over one connection, calls whose values need a KMS that does not answer wait, and all others do not. When it answers, those that waited go on, each in its order.
func TestNobodyWaitsForAnothersKMS(t *testing.T) {
	bothWays(t, func(t *testing.T, startProxy starter) {
		kms := newSlowKMS()
		etcd := serveStore(t, "fast/1", "slow/2", "fast/3")
		conn := startProxy(t, etcd, []Rule{{Prefix: "", Sealer: kms}}, nil).dial(t)
		kv, ctx := pb.NewKVClient(conn), testContext(t)
		get := func(key string) string {
			r, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte(key)})
			if err != nil {
				return err.Error()
			}
			return string(r.Kvs[0].Value)
		}
		put := func(key string) string {
			r, err := kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte("p" + key)})
			if err != nil {
				return err.Error()
			}
			return string(r.PrevKv.Value)
		}
		stream := func() string {
			s, err := kv.RangeStream(ctx, &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")})
			var all []string
			for err == nil {
				var r *pb.RangeStreamResponse
				if r, err = s.Recv(); err == nil {
					all = append(all, string(r.GetRangeResponse().Kvs[0].Value))
				}
			}
			return strings.Join(all, " ") + " " + err.Error()
		}
		watch := func(keys ...string) func() string {
			s, err := pb.NewWatchClient(conn).Watch(ctx)
			if err != nil {
				t.Fatal(err)
			}
			for _, k := range keys {
				r := &pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: []byte(k)}}}
				if err := s.Send(r); err != nil {
					t.Fatal(err)
				}
			}
			return func() string {
				var all []string
				for range keys {
					r, err := s.Recv()
					if err != nil {
						return err.Error()
					}
					all = append(all, string(r.Events[0].Kv.Value))
				}
				return strings.Join(all, " ")
			}
		}
		slow := map[string]func() string{
			"vslow/get":                   func() string { return get("slow/get") },
			"pslow/put":                   func() string { return put("slow/put") },
			"vfast/1 vslow/2 vfast/3 EOF": stream,
			"vslow/w1 vfast/w2 vslow/w3 vfast/w4 vfast/": watch("slow/w1", "fast/w2", "slow/w3", "fast/w4", "fast/"),
		}
		var all sync.WaitGroup
		for want, do := range slow {
			all.Go(func() {
				if got := do(); got != want {
					t.Errorf("got %q, want %q", got, want)
				}
			})
		}
		var waiting []string
		for range slow {
			waiting = append(waiting, wait(t, kms.waiting, "a wait for the KMS"))
		}
		slices.Sort(waiting)
		if got := strings.Join(waiting, " "); got != "slow/2 slow/get slow/put slow/w1" {
			t.Errorf("%s wait", got)
		}
		for i := range 20 {
			key := fmt.Sprint("fast/", i)
			if got := get(key) + put(key) + watch(key, key)(); got != "v"+key+"p"+key+"v"+key+" v"+key {
				t.Errorf("beside those that wait: %q", got)
			}
		}
		close(kms.release)
		all.Wait()
	})
}

// TestWhoWaitsMayLeave: a call that waits for the KMS ends with its client or its deadline, and then nobody waits for it any more.
func TestWhoWaitsMayLeave(t *testing.T) {
	bothWays(t, func(t *testing.T, startProxy starter) {
		kms := newSlowKMS()
		proxy := startProxy(t, serveStore(t), []Rule{{Prefix: "", Sealer: kms}}, nil)
		kv := pb.NewKVClient(proxy.dial(t))
		for name, do := range map[string]func(context.Context) error{
			"open": func(ctx context.Context) error {
				_, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte("slow")})
				return err
			},
			"seal": func(ctx context.Context) error {
				_, err := kv.Put(ctx, &pb.PutRequest{Key: []byte("slow")})
				return err
			},
		} {
			ctx, cancel := context.WithCancel(testContext(t))
			done := make(chan error, 1)
			go func() { done <- do(ctx) }()
			wait(t, kms.waiting, name)
			cancel()
			if err := wait(t, done, name); status.Code(err) != codes.Canceled {
				t.Errorf("%s: %v", name, err)
			}
			wait(t, kms.left, name+": the end of the wait")

			ctx, cancel = context.WithTimeout(testContext(t), 50*time.Millisecond)
			go func() { done <- do(ctx) }()
			if err := wait(t, done, name); status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("%s: %v", name, err)
			}
			cancel()
			if len(kms.waiting) > 0 { // it had got so far
				<-kms.waiting
				wait(t, kms.left, name+": the end of the wait")
			}
		}
		// And so it does with the proxy.
		done := make(chan error, 1)
		go func() {
			_, err := kv.Range(testContext(t), &pb.RangeRequest{Key: []byte("slow")})
			done <- err
		}()
		wait(t, kms.waiting, "a wait for the KMS")
		close(kms.release)
		if err := wait(t, done, "the answer"); err != nil {
			t.Error(err)
		}
	})
}

// TestLongListWaits: a list of many parts, one of which needs the KMS in its midst, comes whole.
func TestLongListWaits(t *testing.T) {
	bothWays(t, func(t *testing.T, startProxy starter) {
		kms := newSlowKMS()
		var list []string
		for i := range 3000 {
			list = append(list, fmt.Sprintf("fast/%04d/%s", i, strings.Repeat("x", i%500)))
		}
		list[2000] = "slow/1" + strings.Repeat("y", 100_000)
		list[2999] = "slow/2"
		conn := startProxy(t, serveStore(t, list...), []Rule{{Prefix: "", Sealer: kms}}, nil).dial(t)
		type result struct {
			resp *pb.RangeResponse
			err  error
		}
		done := make(chan result, 1)
		go func() {
			r, err := pb.NewKVClient(conn).Range(testContext(t), &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")})
			done <- result{r, err}
		}()
		wait(t, kms.waiting, "a wait for the KMS")
		close(kms.release)
		got := wait(t, done, "the list")
		if got.err != nil || len(got.resp.Kvs) != len(list) {
			t.Fatalf("%d of %d, %v", len(got.resp.GetKvs()), len(list), got.err)
		}
		for i, kv := range got.resp.Kvs {
			if string(kv.Key) != list[i] || string(kv.Value) != "v"+list[i] {
				t.Fatalf("key %d: %.40q, value %.40q", i, kv.Key, kv.Value)
			}
		}
	})
}
