package soak

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestGrowth puts gets, puts, transactions, lists and watches on the proxy for as long as SOAK
// says, while nothing fails. Memory, goroutines and open files must not grow after the first part:
// it fits a line to each of them, and limits its slope.
func TestGrowth(t *testing.T) {
	const (
		clients = 64
		values  = 2000
		size    = 1 << 10
		listed  = 100       // keys of a list
		most    = 192 << 20 // bytes of memory
	)
	total := length(t)
	env := harness.New(t)
	etcd := env.StartEtcd(harness.EtcdConfig{Flags: []string{"--max-wals", "2", "--log-level", "error", "--auto-compaction-mode", "revision", "--auto-compaction-retention", "10000"}})
	proxy := env.StartProxy("proxy", harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: []string{etcd.URL}}, KMS: []harness.KMSConfig{env.LocalKey("dev", 1)},
		Rules: []harness.Rule{{Prefix: sealed, WriteWith: "dev", AllowPlaintextReads: new(bool)}}, Log: harness.LogConfig{Level: "info"},
	})
	proxy.WaitReady(30 * time.Second)
	value := env.Sealed.Value(strings.Repeat("v", size-len(env.Sealed.Value(""))))
	name := func(n int) []byte { return fmt.Appendf(nil, "%skey-%04d", sealed, n) }
	first := pb.NewKVClient(harness.Dial(t, proxy.Address, nil))
	for n := range values {
		if _, err := first.Put(t.Context(), &pb.PutRequest{Key: name(n), Value: []byte(value)}); err != nil {
			t.Fatal(err)
		}
	}

	ctx, stop := context.WithTimeout(t.Context(), total)
	defer stop()
	var running sync.WaitGroup
	var requests, events atomic.Int64
	for c := range clients {
		conn := harness.Dial(t, proxy.Address, nil)
		kv := pb.NewKVClient(conn)
		running.Go(func() {
			for ctx.Err() == nil {
				// A deadline of its own: the end of the test must not look like an error.
				own, cancel := limited()
				key := name(rand.IntN(values))
				put := &pb.PutRequest{Key: key, Value: []byte(value)}
				var kvs int
				var err error
				switch kind := rand.IntN(20); {
				case kind < 10:
					var r *pb.RangeResponse
					r, err = kv.Range(own, &pb.RangeRequest{Key: key})
					if kvs = len(r.GetKvs()); err == nil && (kvs != 1 || string(r.Kvs[0].Value) != value) {
						err = fmt.Errorf("another value than was written")
					}
				case kind < 14:
					_, err = kv.Put(own, put)
				case kind < 18:
					_, err = kv.Txn(own, &pb.TxnRequest{
						Compare: []*pb.Compare{{Key: key, Target: pb.Compare_MOD, Result: pb.Compare_GREATER, TargetUnion: &pb.Compare_ModRevision{}}},
						Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: put}}},
					})
				case kind < 19:
					var r *pb.RangeResponse
					r, err = kv.Range(own, &pb.RangeRequest{Key: name(0), RangeEnd: name(values), Limit: listed})
					if err == nil && len(r.Kvs) != listed {
						err = fmt.Errorf("a list has %d keys", len(r.Kvs))
					}
				default:
					err = once(own, pb.NewWatchClient(conn), key, kv, put)
					events.Add(1)
				}
				cancel()
				if err != nil {
					t.Errorf("client %d: %v", c, err)
					return
				}
				requests.Add(1)
				time.Sleep(time.Duration(rand.IntN(40)) * time.Millisecond) // so that the load can last
			}
		})
	}
	var memory, goroutines, files line
	begun, missed := time.Now(), 0
	for ctx.Err() == nil {
		select {
		case <-ctx.Done():
		case <-time.After(max(250*time.Millisecond, total/400)):
			now, err := fetch("http://" + proxy.Config.Admin.Address + "/metrics")
			if err != nil { // a busy machine
				missed++
				continue
			}
			at := time.Since(begun)
			memory.add(at, metricOf(t, now, "process_resident_memory_bytes"))
			goroutines.add(at, metricOf(t, now, "go_goroutines"))
			files.add(at, metricOf(t, now, "process_open_fds"))
		}
	}
	running.Wait()
	if missed > len(memory.at)/2 {
		t.Errorf("%d of %d samples are missing", missed, missed+len(memory.at))
	}
	if requests.Load() < 500 || events.Load() < 5 {
		t.Errorf("%d requests and %d events say little", requests.Load(), events.Load())
	}
	t.Logf("%d requests in %v, %.0f a second, %d of them watches", requests.Load(), total, float64(requests.Load())/total.Seconds(), events.Load())
	// After some minutes, everything that is needed is there. A shorter run shows only a fast
	// growth.
	from, heap := min(total/3, 3*time.Minute), 4.0
	if total < 8*time.Minute {
		heap = 48
	}
	for _, figure := range []struct {
		name string
		line *line
		unit float64
		// most is how much the line may rise from there to the end, in percent of its mean, and
		// what is added to that in units: samples vary.
		percent, more float64
	}{
		{"resident MiB", &memory, 1 << 20, 5, heap},
		{"goroutines", &goroutines, 1, 5, 10},
		{"open files", &files, 1, 2, 3},
	} {
		slope, mean, least, highest := figure.line.fit(from)
		rise := slope * (total - from).Seconds()
		t.Logf("%s from %v on: mean %.1f, %.1f to %.1f, slope %+.2f per hour", figure.name, from, mean/figure.unit, least/figure.unit, highest/figure.unit, slope*3600/figure.unit)
		if figure.line == &memory && mean > most {
			t.Errorf("the mean of the memory is more than %d MiB", most>>20)
		}
		if limit := mean*figure.percent/100 + figure.more*figure.unit; rise > limit {
			t.Errorf("%s rise by %.1f in %v; the limit is %.1f", figure.name, rise/figure.unit, total-from, limit/figure.unit)
		}
	}
}

func fetch(url string) (string, error) {
	client := http.Client{Timeout: 5 * time.Second}
	response, err := client.Get(url)
	if err != nil {
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	return string(body), err
}

// once watches a key until it gets the event of a put.
func once(ctx context.Context, watch pb.WatchClient, key []byte, kv pb.KVClient, put *pb.PutRequest) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := watch.Watch(ctx)
	if err != nil {
		return err
	}
	if err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{Key: key}}}); err != nil {
		return err
	}
	if _, err := stream.Recv(); err != nil {
		return err
	}
	if _, err := kv.Put(ctx, put); err != nil {
		return err
	}
	r, err := stream.Recv()
	if err == nil && (len(r.Events) == 0 || string(r.Events[0].Kv.Value) != string(put.Value)) {
		err = fmt.Errorf("a watch has another value than was written")
	}
	return err
}

// metricOf returns a metric without labels.
func metricOf(t *testing.T, metrics, name string) (value float64) {
	t.Helper()
	_, rest, ok := strings.Cut(metrics, "\n"+name+" ")
	if _, err := fmt.Sscan(rest, &value); err != nil || !ok {
		t.Errorf("metric %s: %v", name, err)
	}
	return value
}

// line is a figure over time.
type line struct{ at, value []float64 }

func (l *line) add(at time.Duration, value float64) {
	l.at, l.value = append(l.at, at.Seconds()), append(l.value, value)
}

// fit returns the slope per second of the line with the least squares through the samples from a
// moment on, their mean, and the smallest and the largest of them.
func (l *line) fit(from time.Duration) (slope, mean, least, most float64) {
	var n, sumAt, sumValue float64
	for i, at := range l.at {
		if at < from.Seconds() {
			continue
		}
		if n == 0 {
			least, most = l.value[i], l.value[i]
		}
		least, most = min(least, l.value[i]), max(most, l.value[i])
		n, sumAt, sumValue = n+1, sumAt+at, sumValue+l.value[i]
	}
	if n == 0 {
		return 0, 0, 0, 0
	}
	meanAt := sumAt / n
	mean = sumValue / n
	var up, down float64
	for i, at := range l.at {
		if at >= from.Seconds() {
			up, down = up+(at-meanAt)*(l.value[i]-mean), down+(at-meanAt)*(at-meanAt)
		}
	}
	if down > 0 {
		slope = up / down
	}
	return slope, mean, least, most
}

// TestFit checks the fitted line with known ones.
func TestFit(t *testing.T) {
	var l line
	for i := range 100 {
		l.add(time.Duration(i)*time.Second, 1000*float64(i%2))
	}
	for i := range 100 {
		l.add(time.Duration(100+i)*time.Second, 500+3*float64(i)+float64(i%2))
	}
	slope, mean, least, most := l.fit(100 * time.Second)
	if slope < 2.99 || slope > 3.01 || mean < 648 || mean > 650 || least != 500 || most != 798 {
		t.Errorf("slope %v, mean %v, from %v to %v", slope, mean, least, most)
	}
}
