package proxy

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdapi"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
)

// starter is startProxy, with calls relayed or handled.
type starter = func(t testing.TB, etcd string, rules []etcdapi.Rule, edit func(*Config)) *running

// bothWays runs a test with calls that are relayed, and with calls that are handled.
func bothWays(t *testing.T, test func(t *testing.T, startProxy starter)) {
	for name, relays := range map[string]bool{"relayed": true, "handled": false} {
		t.Run(name, func(t *testing.T) {
			test(t, func(t testing.TB, etcd string, rules []etcdapi.Rule, edit func(*Config)) *running {
				t.Helper()
				return startRelaying(t, etcd, rules, edit, relays)
			})
		})
	}
}

// TestNobodyWaitsForAnothersKMS: over one connection, calls whose values need a KMS that does not
// answer wait, and all others do not. When it answers, those that waited go on, each in its order.
func TestNobodyWaitsForAnothersKMS(t *testing.T) {
	bothWays(t, func(t *testing.T, startProxy starter) {
		kms := proxytest.NewSlowKMS()
		etcd := proxytest.ServeStore(t, "fast/1", "slow/2", "fast/3")
		conn := startProxy(t, etcd, []etcdapi.Rule{{Prefix: "", Sealer: kms}}, nil).dial(t)
		kv, ctx := pb.NewKVClient(conn), proxytest.TestContext(t)
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
			waiting = append(waiting, proxytest.Wait(t, kms.Waiting, "a wait for the KMS"))
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
		close(kms.Release)
		all.Wait()
	})
}

// TestWhoWaitsMayLeave: a call that waits for the KMS ends with its client or its deadline, and
// then nobody waits for it any more.
func TestWhoWaitsMayLeave(t *testing.T) {
	bothWays(t, func(t *testing.T, startProxy starter) {
		kms := proxytest.NewSlowKMS()
		proxy := startProxy(t, proxytest.ServeStore(t), []etcdapi.Rule{{Prefix: "", Sealer: kms}}, nil)
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
			ctx, cancel := context.WithCancel(proxytest.TestContext(t))
			done := make(chan error, 1)
			go func() { done <- do(ctx) }()
			proxytest.Wait(t, kms.Waiting, name)
			cancel()
			if err := proxytest.Wait(t, done, name); status.Code(err) != codes.Canceled {
				t.Errorf("%s: %v", name, err)
			}
			proxytest.Wait(t, kms.Left, name+": the end of the wait")

			ctx, cancel = context.WithTimeout(proxytest.TestContext(t), 50*time.Millisecond)
			go func() { done <- do(ctx) }()
			if err := proxytest.Wait(t, done, name); status.Code(err) != codes.DeadlineExceeded {
				t.Errorf("%s: %v", name, err)
			}
			cancel()
			if len(kms.Waiting) > 0 { // it had got so far
				<-kms.Waiting
				proxytest.Wait(t, kms.Left, name+": the end of the wait")
			}
		}
		// And so it does with the proxy.
		done := make(chan error, 1)
		go func() {
			_, err := kv.Range(proxytest.TestContext(t), &pb.RangeRequest{Key: []byte("slow")})
			done <- err
		}()
		proxytest.Wait(t, kms.Waiting, "a wait for the KMS")
		close(kms.Release)
		if err := proxytest.Wait(t, done, "the answer"); err != nil {
			t.Error(err)
		}
	})
}

// TestLongListWaits: a list of many parts, one of which needs the KMS in its midst, comes whole.
func TestLongListWaits(t *testing.T) {
	bothWays(t, func(t *testing.T, startProxy starter) {
		kms := proxytest.NewSlowKMS()
		var list []string
		for i := range 3000 {
			list = append(list, fmt.Sprintf("fast/%04d/%s", i, strings.Repeat("x", i%500)))
		}
		list[2000] = "slow/1" + strings.Repeat("y", 100_000)
		list[2999] = "slow/2"
		conn := startProxy(t, proxytest.ServeStore(t, list...), []etcdapi.Rule{{Prefix: "", Sealer: kms}}, nil).dial(t)
		type result struct {
			resp *pb.RangeResponse
			err  error
		}
		done := make(chan result, 1)
		go func() {
			r, err := pb.NewKVClient(conn).Range(proxytest.TestContext(t), &pb.RangeRequest{Key: []byte("a"), RangeEnd: []byte("z")})
			done <- result{r, err}
		}()
		proxytest.Wait(t, kms.Waiting, "a wait for the KMS")
		close(kms.Release)
		got := proxytest.Wait(t, done, "the list")
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
