// Package limits proves what bad clients can do to the proxy, and to its other clients: be refused,
// or be let go. Where bare etcd has an answer, it is the same one. The processes are real, every
// key is under a rule, and while a client misbehaves another one is served.
package limits

import (
	"bufio"
	"context"
	"fmt"
	"net/http"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestMain has the processes collect their garbage early, so that what they hold can be told from
// what they have yet to throw away.
func TestMain(m *testing.M) {
	_ = os.Setenv("GOGC", "25") // never fails
	os.Exit(m.Run())
}

// site is a bare etcd, and the proxy before another one with the same flags.
type site struct {
	env          *harness.Env
	bare, behind *harness.Etcd
	proxy        *harness.Proxy
}

// sealing is how much more etcd must let through than the proxy does.
const sealing = 256 << 10

// newSite starts one. maxRequest is the limit for clients, 0 the default; edit may change the
// proxy's configuration.
func newSite(t *testing.T, maxRequest int, edit func(*site, *harness.ProxyConfig), flags ...string) *site {
	t.Helper()
	s := &site{env: harness.New(t)}
	if maxRequest == 0 {
		maxRequest = 1536 << 10
	}
	s.bare = s.env.StartEtcd(harness.EtcdConfig{Name: "bare", Bare: true, MaxRequestBytes: maxRequest, Flags: flags})
	s.behind = s.env.StartEtcd(harness.EtcdConfig{Name: "behind", MaxRequestBytes: maxRequest + sealing, Flags: flags})
	cfg := s.config(s.behind.URL)
	cfg.Etcd.MaxRequestBytes = maxRequest
	if edit != nil {
		edit(s, &cfg)
	}
	s.proxy = s.env.StartProxy("proxy", cfg)
	s.proxy.WaitReady(30 * time.Second)
	return s
}

// newSiteBefore is a proxy before an etcd that the test plays.
func newSiteBefore(t *testing.T, etcd string) *site {
	t.Helper()
	s := &site{env: harness.New(t)}
	s.proxy = s.env.StartProxy("proxy", s.config(etcd))
	s.proxy.WaitReady(30 * time.Second)
	return s
}

// config seals every key.
func (s *site) config(etcd string) harness.ProxyConfig {
	return harness.ProxyConfig{
		Coordination: harness.NoCoordination(),
		Etcd:         harness.Upstream{Endpoints: []string{etcd}},
		KMS:          []harness.KMSConfig{s.env.LocalKey("local", 1)},
		Rules:        []harness.Rule{{Prefix: "", WriteWith: "local"}},
		Log:          harness.LogConfig{Level: "info"},
	}
}

// sides are the two that clients must not be able to tell apart.
func (s *site) sides() map[string]string {
	return map[string]string{"bare etcd": s.bare.Address, "the proxy": s.proxy.Address}
}

// honestTimeout is how long an honest client's call may take while others misbehave. It is for
// machines that others work on, too: calls take a millisecond.
const honestTimeout = 5 * time.Second

// honestClient starts an honest client that writes and reads until the returned function is called,
// which fails the test if any call failed or had to wait.
func (s *site) honestClient(t *testing.T) (done func()) {
	t.Helper()
	conn := harness.Dial(t, s.proxy.Address, s.proxy.TLS)
	kv, value := pb.NewKVClient(conn), s.env.Sealed.Value("witness")
	ctx, stop := context.WithCancel(t.Context())
	var calls int
	var longest time.Duration
	var failed error
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for ; ctx.Err() == nil && failed == nil; calls++ {
			begun := time.Now()
			failed = once(kv, "/witness", value)
			longest = max(longest, time.Since(begun))
			time.Sleep(2 * time.Millisecond) // it is not the load
		}
	}()
	return sync.OnceFunc(func() {
		t.Helper()
		stop()
		<-ended
		conn.Close()
		t.Logf("beside it %d honest calls, the longest %v", calls, longest.Round(time.Millisecond))
		if failed != nil || longest > honestTimeout || calls == 0 {
			t.Errorf("an honest client: %d calls, the longest took %v, %v", calls, longest, failed)
		}
	})
}

func once(kv pb.KVClient, key, value string) error {
	ctx, cancel := context.WithTimeout(context.Background(), 2*honestTimeout)
	defer cancel()
	if _, err := kv.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(value)}); err != nil {
		return fmt.Errorf("put: %w", err)
	}
	r, err := kv.Range(ctx, &pb.RangeRequest{Key: []byte(key)})
	if err != nil {
		return fmt.Errorf("range: %w", err)
	}
	if len(r.Kvs) != 1 || string(r.Kvs[0].Value) != value {
		return fmt.Errorf("range: %d keys, or another value", len(r.Kvs))
	}
	return nil
}

// usage is what the proxy holds.
type usage struct {
	peak       int64 // bytes of the system
	heap       int64 // bytes, garbage among them
	goroutines int
}

func (u usage) String() string {
	return fmt.Sprintf("heap %d MiB, peak %d MiB, %d goroutines", u.heap>>20, u.peak>>20, u.goroutines)
}

// usage reads the peak from /proc and the rest from the admin port. Where there is no /proc, the
// peak is 0.
func (s *site) usage(t *testing.T) usage {
	t.Helper()
	var u usage
	status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.proxy.PID()))
	if _, rest, ok := strings.Cut(string(status), "VmHWM:"); ok {
		kib, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		u.peak = kib << 10
	}
	u.heap = int64(s.metric(t, "go_memstats_heap_alloc_bytes"))
	u.goroutines = int(s.metric(t, "go_goroutines"))
	return u
}

// metric adds up the series of one name on the proxy's admin port.
func (s *site) metric(t *testing.T, name string) (sum float64) {
	t.Helper()
	client := http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{DisableKeepAlives: true}}
	answer, err := client.Get("http://" + s.proxy.Config.Admin.Address + "/metrics")
	if err != nil {
		t.Fatalf("read metrics: %v", err)
	}
	defer answer.Body.Close()
	found := false
	for lines := bufio.NewScanner(answer.Body); lines.Scan(); {
		series, value, ok := strings.Cut(lines.Text(), " ")
		if before, _, _ := strings.Cut(series, "{"); !ok || before != name {
			continue
		}
		n, err := strconv.ParseFloat(value, 64)
		if err != nil {
			t.Fatalf("read metric %s: %v", name, err)
		}
		found, sum = true, sum+n
	}
	if !found {
		t.Fatalf("read metrics: there is no %s", name)
	}
	return sum
}

// What may stay: the goroutines of some connections to etcd's own HTTP, which are kept, and
// buffers.
const spare, spareBytes = 50, 24 << 20

// settles waits until the proxy holds no more goroutines and no more memory than before, but for a
// few.
func (s *site) settles(t *testing.T, before usage) {
	t.Helper()
	conn := harness.Dial(t, s.proxy.Address, s.proxy.TLS)
	defer conn.Close()
	kv, value := pb.NewKVClient(conn), s.env.Sealed.Value(strings.Repeat("g", 1<<20))
	harness.Eventually(t, 30*time.Second, "the proxy to let go", func() error {
		u := s.usage(t)
		if u.goroutines > before.goroutines+spare || u.heap > before.heap+spareBytes {
			// The collector comes by when there is something to collect.
			for range 8 {
				if err := once(kv, "/garbage", value); err != nil {
					return err
				}
			}
			return fmt.Errorf("%v, before %v", u, before)
		}
		return s.proxy.Alive()
	})
}

// abused runs abuse twice beside an honest client. What a bad client takes is never more than limit
// bytes, and it is given back.
func (s *site) abused(t *testing.T, limit int64, abuse func()) {
	t.Helper()
	before := s.usage(t)
	for range 2 {
		done := s.honestClient(t)
		abuse()
		done()
		s.settles(t, before)
	}
	after := s.usage(t)
	t.Logf("before: %v; after: %v", before, after)
	if after.peak > before.peak+limit {
		t.Errorf("the proxy took up to %d MiB, %d MiB more than it may", after.peak>>20, (after.peak-before.peak-limit)>>20)
	}
}

func dial(t *testing.T, address string, options ...grpc.DialOption) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("passthrough:///"+address, append([]grpc.DialOption{grpc.WithTransportCredentials(insecureTransport), grpc.WithDisableRetry()}, options...)...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	return conn
}
