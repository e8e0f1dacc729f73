// Package soak puts the proxy, a real etcd and a simulated Alibaba Cloud KMS under load while the
// KMS has trouble: it rotates its key, throttles, hangs, closes connections, fails, and has its key
// disabled. Nothing may be lost, wrong or leaked, and keys without a rule must not be affected.
//
// SOAK is the duration, as Go writes durations; 10m is the full length.
package soak

import (
	"context"
	"fmt"
	"net/http"
	"os"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/kmsdouble"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

const (
	workers  = 16
	keysEach = 8
	sealed   = "/registry/secrets/"
	clear    = "/registry/configmaps/"
	provider = "ack"
)

func length(t *testing.T) time.Duration {
	t.Helper()
	if text := os.Getenv("SOAK"); text != "" {
		d, err := time.ParseDuration(text)
		if err != nil {
			t.Fatalf("SOAK: %v", err)
		}
		return d
	}
	if testing.Short() {
		return 20 * time.Second
	}
	return time.Minute
}

// TestSoak runs the load and the trouble at the same time.
func TestSoak(t *testing.T) {
	total := length(t)
	env := harness.New(t)
	etcd := env.StartEtcd(harness.EtcdConfig{})
	double := env.NewAlibaba()
	proxy := env.StartProxy("proxy", harness.ProxyConfig{
		Etcd:  harness.Upstream{Endpoints: []string{etcd.URL}},
		KMS:   []harness.KMSConfig{env.AlibabaKey(provider, double)},
		Rules: []harness.Rule{{Prefix: sealed, WriteWith: provider, AllowPlaintextReads: new(bool)}},
		// DEK seeds are unwrapped repeatedly, so that reading depends on the KMS as well.
		Cache: &harness.Cache{TTL: "3s", RevokeWithin: "2s"},
		Log:   harness.LogConfig{Level: "info"},
	})
	proxy.WaitReady(30 * time.Second)
	conn := harness.Dial(t, proxy.Address, nil)

	ctx, stop := context.WithTimeout(t.Context(), total)
	defer stop()
	l := &load{env: env, conn: conn}
	k := &trouble{double: double, proxy: proxy}
	var running sync.WaitGroup
	for w := range workers {
		running.Go(func() { l.work(ctx, t, w) })
	}
	running.Go(func() { k.makeTrouble(ctx, t, l) })

	// Memory and goroutines are compared between the first half and the second, both under load.
	halves := [2]figures{}
	for i := range halves {
		for end := time.Now().Add(total / 2); time.Now().Before(end) && ctx.Err() == nil; {
			select {
			case <-time.After(2 * time.Second):
				halves[i].sample(t, proxy.Scrape())
			case <-ctx.Done():
			}
		}
	}
	running.Wait()

	double.ClearFaults()
	double.SetState(kmsdouble.DefaultKeyID, kmsdouble.Enabled)
	proxy.WaitReady(time.Minute)
	l.checkAll(t)
	checkStored(t, harness.Dial(t, etcd.Address, nil))
	t.Logf("%d puts, %d gets; %d and %d of them refused while the KMS was in trouble; %d rotations, troubles %v, all well again after %v at most; calls of the KMS: %v",
		l.puts.Load(), l.gets.Load(), l.putErrors.Load(), l.getErrors.Load(), k.rotations, k.counts, k.slowest, double.CallCounts())
	if l.puts.Load() < 100 || l.gets.Load() < 100 || k.rotations == 0 {
		t.Error("too little happened to say anything")
	}
	// A rotation causes one; calls that were applied but reported as failed are repeated.
	if n := double.Applied("GenerateDataKey"); n > 3*(k.rotations+k.counts["disabled"]+1)+int(total/time.Second) {
		t.Errorf("%d data keys for %d rotations", n, k.rotations)
	}
	t.Logf("goroutines and resident MiB at most, in the first and second half: %v", halves)
	if a, b := halves[0], halves[1]; b.goroutines > 2*a.goroutines+100 || b.resident > a.resident*3/2+64<<20 {
		t.Errorf("the proxy grows: %v", halves)
	}
}

// figures are the highest of a half.
type figures struct {
	goroutines, resident int // bytes
}

func (f figures) String() string { return fmt.Sprintf("%d, %d", f.goroutines, f.resident>>20) }

var metric = regexp.MustCompile(`(?m)^(go_goroutines|process_resident_memory_bytes) (\S+)$`)

func (f *figures) sample(t *testing.T, metrics string) {
	t.Helper()
	for _, m := range metric.FindAllStringSubmatch(metrics, -1) {
		v, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			t.Errorf("metric %s: %v", m[0], err)
			continue
		}
		if m[1] == "go_goroutines" {
			f.goroutines = max(f.goroutines, int(v))
		} else {
			f.resident = max(f.resident, int(v))
		}
	}
}

// trouble is what happens to the KMS.
type trouble struct {
	double    *kmsdouble.Double
	proxy     *harness.Proxy
	rotations int
	counts    map[string]int
	slowest   time.Duration // of the recoveries
}

// makeTrouble rotates the key every 20 seconds (more often in a short run) and causes one trouble
// after the other in between, each for a while and followed by a time without.
func (k *trouble) makeTrouble(ctx context.Context, t *testing.T, l *load) {
	k.counts = map[string]int{}
	every := min(20*time.Second, length(t)/6)
	sleep := func(d time.Duration) bool {
		select {
		case <-time.After(d):
			return true
		case <-ctx.Done():
			return false
		}
	}
	nth := func(n uint64, f kmsdouble.FaultSpec) func(*http.Request) *kmsdouble.FaultSpec {
		var count atomic.Uint64
		return func(*http.Request) *kmsdouble.FaultSpec {
			if count.Add(1)%n != 0 {
				return nil
			}
			return &f
		}
	}
	troubles := []struct {
		name string
		hook func(*http.Request) *kmsdouble.FaultSpec
	}{
		{"throttle", nth(2, kmsdouble.FaultSpec{Kind: kmsdouble.Throttle})},
		{"applied but failed", nth(2, kmsdouble.FaultSpec{Kind: kmsdouble.ServerError, Applied: true})},
		{"disabled", nil},
		{"hang", nth(1, kmsdouble.FaultSpec{Kind: kmsdouble.Hang})},
		{"cut answer", nth(2, kmsdouble.FaultSpec{Kind: kmsdouble.CutAnswer})},
		{"dead", nth(1, kmsdouble.FaultSpec{Kind: kmsdouble.Cut})},
		{"garbage", nth(3, kmsdouble.FaultSpec{Kind: kmsdouble.HTML})},
	}
	for i := 0; ; i++ {
		k.double.Rotate(kmsdouble.DefaultKeyID)
		k.rotations++
		tr := troubles[i%len(troubles)]
		if !sleep(every / 4) {
			return
		}
		k.counts[tr.name]++
		l.trouble.Store(true)
		if tr.hook == nil {
			k.double.SetState(kmsdouble.DefaultKeyID, kmsdouble.Disabled)
		} else {
			k.double.SetFault(tr.hook)
		}
		more := sleep(every / 2)
		k.double.ClearFaults()
		k.double.SetState(kmsdouble.DefaultKeyID, kmsdouble.Enabled)
		// No excuses from here on: it must work within a given time, and until the next trouble.
		if !k.recovers(t, l, tr.name) {
			return
		}
		l.trouble.Store(false)
		if !more || !sleep(every/4) {
			return
		}
	}
}

// recovery is the longest time that the proxy may need after a trouble: a call that hangs times out
// after 3 s, the circuit breaker permits a probe after 5 s, and the health check, every second,
// unwraps the DEK seed that a rule needs. The rest is for a slow machine.
const recovery = 20 * time.Second

// recovers waits until everything can be written and read again, also if the load ends meanwhile.
func (k *trouble) recovers(t *testing.T, l *load, name string) bool {
	kv := pb.NewKVClient(l.conn)
	begun := time.Now()
	for {
		err := k.proxy.Ready()
		own, cancel := limited()
		if err == nil {
			_, err = kv.Put(own, &pb.PutRequest{Key: []byte(sealed + "well"), Value: []byte(l.env.Sealed.Value("well"))})
		}
		if err == nil {
			_, err = kv.Range(own, &pb.RangeRequest{Key: []byte(sealed), RangeEnd: []byte(sealed[:len(sealed)-1] + "0")})
		}
		cancel()
		switch {
		case err == nil:
			k.slowest = max(k.slowest, time.Since(begun))
			return true
		case time.Since(begun) > recovery:
			t.Errorf("%v after the KMS was in trouble (%s) and is well again: %v", recovery, name, err)
			return false
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// load is the clients. Each worker has its own keys, so it knows their possible values.
type load struct {
	env     *harness.Env
	conn    *grpc.ClientConn
	trouble atomic.Bool // the KMS has trouble, or has not recovered from it

	puts, gets, putErrors, getErrors atomic.Int64

	mu   sync.Mutex
	keys map[string][]string // the possible values of each key; "" for none
}

func (l *load) may(key string) []string {
	l.mu.Lock()
	defer l.mu.Unlock()
	if v := l.keys[key]; v != nil {
		return v
	}
	return []string{""}
}

func (l *load) set(key string, values ...string) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.keys == nil {
		l.keys = map[string][]string{}
	}
	l.keys[key] = values
}

func checkStored(t *testing.T, raw *grpc.ClientConn) {
	t.Helper()
	stored, err := pb.NewKVClient(raw).Range(t.Context(), &pb.RangeRequest{Key: []byte(sealed), RangeEnd: []byte(sealed[:len(sealed)-1] + "0")})
	if err != nil {
		t.Fatal(err)
	}
	if len(stored.Kvs) == 0 {
		t.Error("etcd holds nothing under the rule")
	}
	for _, kv := range stored.Kvs {
		if !strings.HasPrefix(string(kv.Value), "k8s:enc:kms:v2:"+provider+":") {
			t.Errorf("%s is not sealed", kv.Key)
		}
	}
}
