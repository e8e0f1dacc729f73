package scale

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/grpc"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestConnections opens thousands of client connections with a watch each. Every watch must receive
// every write to its keys, once and in order. It measures the memory of a connection, and what is
// left of it when the clients have gone.
func TestConnections(t *testing.T) {
	const (
		groups = 100       // watches of one group have the same keys
		most   = 128 << 10 // bytes of one connection with its watch
	)
	n := size(t, "SCALE_CONNECTIONS", 2000, 500)
	length := 10 * time.Second
	if text := os.Getenv("SCALE_TIME"); text != "" {
		var err error
		if length, err = time.ParseDuration(text); err != nil {
			t.Fatalf("SCALE_TIME: %v", err)
		}
	}
	files(t, 2*n+1000) // the proxy has a connection to etcd for each of its clients
	env := harness.New(t)
	etcd := env.StartEtcd(harness.EtcdConfig{Flags: []string{"--log-level", "error"}})
	proxy := env.StartProxy("proxy", harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: []string{etcd.URL}}, KMS: []harness.KMSConfig{env.LocalKey("dev", 1)},
		Rules: []harness.Rule{{Prefix: prefix, WriteWith: "dev", AllowPlaintextReads: new(false)}}, Log: harness.LogConfig{Level: "info"},
	})
	proxy.WaitReady(within)
	kv := pb.NewKVClient(harness.Dial(t, proxy.Address, nil))
	put := func(group, seq int) {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), within)
		defer cancel()
		key, value := fmt.Appendf(nil, "%s%d/%d", prefix, group, seq%7), env.Sealed.Value(fmt.Sprintf("%d %d", group, seq))
		if _, err := kv.Put(ctx, &pb.PutRequest{Key: key, Value: []byte(value)}); err != nil {
			t.Fatal(err)
		}
	}
	for range 200 { // so that what every client needs is not counted
		put(groups, 0)
	}
	before := use(t, proxy)

	ctx, stop := context.WithCancel(t.Context())
	defer stop()
	var watching sync.WaitGroup
	var created atomic.Int64
	received := make([]atomic.Int64, n)
	slots := make(chan struct{}, 64) // connections that are being opened
	var conns []*grpc.ClientConn
	begun := time.Now()
	for i := range n {
		slots <- struct{}{}
		conn := harness.Dial(t, proxy.Address, nil, grpc.WithReadBufferSize(1<<10), grpc.WithWriteBufferSize(1<<10))
		conns = append(conns, conn)
		watching.Go(func() {
			open := sync.OnceFunc(func() { <-slots })
			defer open()
			stream, err := pb.NewWatchClient(conn).Watch(ctx)
			key := fmt.Appendf(nil, "%s%d/", prefix, i%groups)
			if err == nil {
				err = stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: key, RangeEnd: append(key[:len(key)-1:len(key)-1], '0')}}})
			}
			for err == nil {
				var r *pb.WatchResponse
				if r, err = stream.Recv(); err != nil {
					break
				}
				if r.Created {
					created.Add(1)
					open()
				}
				if r.Canceled {
					t.Errorf("watch %d was canceled: %s", i, r.CancelReason)
					return
				}
				for _, e := range r.Events {
					if want := env.Sealed.Value(fmt.Sprintf("%d %d", i%groups, received[i].Load()+1)); string(e.Kv.Value) != want || e.Type != mvccpb.PUT {
						t.Errorf("watch %d: event %d has another value than the write", i, received[i].Load()+1)
						return
					}
					received[i].Add(1)
				}
			}
			if ctx.Err() == nil {
				t.Errorf("watch %d ended: %v", i, err)
			}
		})
	}
	harness.Eventually(t, 10*within, "all watches", func() error {
		if have := created.Load(); have < int64(n) {
			return fmt.Errorf("%d of %d", have, n)
		}
		return nil
	})
	opened, took := use(t, proxy), time.Since(begun)

	// Writes as fast as the watches get them, in turn to each group.
	written := make([]int, groups)
	begun = time.Now()
	for seq := 1; seq == 1 || time.Since(begun) < length; seq++ {
		for group := range groups {
			put(group, seq)
			written[group] = seq
		}
		harness.Eventually(t, within, "every watch to receive the writes", func() error {
			for i := range received {
				if got := received[i].Load(); got < int64(written[i%groups]) {
					return fmt.Errorf("watch %d has %d of %d events", i, got, written[i%groups])
				}
			}
			return nil
		})
	}
	during, total := use(t, proxy), int64(0)
	for i := range received {
		got := received[i].Load()
		total += got
		if got != int64(written[i%groups]) {
			t.Errorf("watch %d has %d events of %d writes", i, got, written[i%groups])
		}
	}
	each, later := (opened.resident-before.resident)/int64(n), (during.resident-before.resident)/int64(n)
	t.Logf("%d connections opened in %v; %d events in %v", n, took.Round(time.Millisecond), total, time.Since(begun).Round(time.Second))
	t.Logf("before: %v; with the watches: %v, %d bytes each; after the events: %v, %d bytes each", before, opened, each, during, later)
	if each > most || later > most {
		t.Errorf("a connection with a watch takes %d bytes, and %d after events; the limit is %d", each, later, most)
	}
	if opened.files < before.files+2*n {
		t.Errorf("%d connections, and only %d more files", n, opened.files-before.files)
	}

	stop()
	watching.Wait()
	for _, conn := range conns {
		conn.Close()
	}
	harness.Eventually(t, within, "the connections to end", func() error {
		if now := use(t, proxy); now.goroutines > before.goroutines+20 || now.files > before.files+20 {
			return fmt.Errorf("%v", now)
		}
		return nil
	})
	t.Logf("after the clients: %v", use(t, proxy))
}

// TestProxies starts many proxies of one etcd. Each must see all others, a proxy with a weaker
// configuration must be refused, and those that ended must be forgotten. It measures what their
// announcements cost etcd.
func TestProxies(t *testing.T) {
	n := size(t, "SCALE_PROXIES", 20, 8)
	env := harness.New(t)
	etcd := env.StartEtcd(harness.EtcdConfig{Flags: []string{"--log-level", "error"}})
	kms := env.LocalKey("dev", 1)
	config := func() harness.ProxyConfig {
		return harness.ProxyConfig{
			Etcd: harness.Upstream{Endpoints: []string{etcd.URL}}, KMS: []harness.KMSConfig{kms},
			Rules: []harness.Rule{{Prefix: prefix, WriteWith: "dev", AllowPlaintextReads: new(false)}}, Log: harness.LogConfig{Level: "info"},
		}
	}
	var proxies []*harness.Proxy
	begun := time.Now()
	for i := range n {
		proxies = append(proxies, env.StartProxy(fmt.Sprintf("proxy-%d", i), config()))
	}
	for _, p := range proxies {
		p.WaitReady(within)
	}
	t.Logf("%d proxies are ready after %v", n, time.Since(begun).Round(time.Millisecond))
	announced := func(want int) {
		t.Helper()
		begun := time.Now()
		harness.Eventually(t, within, "status to list the proxies", func() error {
			out, code := env.Run("status", "--config", proxies[0].ConfigFile)
			if have := strings.Count(out, "as here"); have != want || code != 0 {
				return fmt.Errorf("it lists %d of %d, with exit code %d", have, want, code)
			}
			return nil
		})
		t.Logf("status lists %d proxies after %v", want, time.Since(begun).Round(time.Millisecond))
	}
	announced(n)

	// At rest.
	const rest = 20 * time.Second
	puts, calls := counter(t, etcd, "etcd_mvcc_put_total"), counter(t, etcd, "grpc_server_handled_total")
	time.Sleep(rest) // the time that is measured
	puts, calls = counter(t, etcd, "etcd_mvcc_put_total")-puts, counter(t, etcd, "grpc_server_handled_total")-calls
	t.Logf("at rest, %d proxies cause %.1f calls and %.2f writes per second", n, calls/rest.Seconds(), puts/rest.Seconds())
	if limit := float64(n)*2*rest.Seconds() + 20; calls > limit {
		t.Errorf("%.0f calls in %v; the limit is %.0f", calls, rest, limit)
	}
	if limit := float64(n)/2*rest.Seconds() + 5; puts > limit {
		t.Errorf("%.0f writes in %v; the limit is %.0f", puts, rest, limit)
	}

	weaker := config()
	weaker.Rules[0].AllowPlaintextReads = new(true)
	p := env.NewProxy("weaker", weaker)
	if out, code := env.Run("serve", "--config", p.ConfigFile); code == 0 || !strings.Contains(out, "protects keys less") {
		t.Errorf("a proxy with a weaker configuration: exit code %d, %s", code, out)
	}

	// A third crashes, and is forgotten when the leases end.
	for _, p := range proxies[2*n/3:] {
		p.Kill()
	}
	announced(2 * n / 3)
	for _, p := range proxies[2*n/3:] {
		p.Start()
		p.WaitReady(within)
	}
	announced(n)
}

// fill writes n values through a proxy, and returns a function that returns the value of a key.
func fill(t *testing.T, env *harness.Env, kv pb.KVClient, n int) (name, value func(i int) string) {
	t.Helper()
	name = func(i int) string { return fmt.Sprintf("%sns-%03d/name-%07d", prefix, i%100, i) }
	value = func(i int) string { return env.Sealed.Value(strconv.Itoa(i) + strings.Repeat(".", 60)) }
	const keys, writers = 100, 4
	var writing sync.WaitGroup
	for w := range writers {
		writing.Go(func() {
			for at := w * keys; at < n; at += writers * keys {
				var puts []*pb.RequestOp
				for i := at; i < min(at+keys, n); i++ {
					puts = append(puts, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(name(i)), Value: []byte(value(i))}}})
				}
				if _, err := kv.Txn(t.Context(), &pb.TxnRequest{Success: puts}); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	writing.Wait()
	if t.Failed() {
		t.FailNow()
	}
	return name, value
}
