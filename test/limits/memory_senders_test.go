package limits

import (
	"bytes"
	"context"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"golang.org/x/net/http2"
	"golang.org/x/sys/unix"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// longestWait is how long a call of an honest client may take in the proxy while others only send.
const longestWait = 200 * time.Millisecond

// TestMemoryOfClientsThatOnlySend: 200 clients send without end what is to be answered, and never
// read. None of the other clients waits for long in the proxy.
func TestMemoryOfClientsThatOnlySend(t *testing.T) {
	for name, send := range map[string]func(k *frameClient, i uint32){
		"pings":                      func(k *frameClient, _ uint32) { _ = k.WritePing(false, [8]byte{}) },
		"settings":                   func(k *frameClient, _ uint32) { _ = k.WriteSettings() },
		"calls of an unknown method": func(k *frameClient, i uint32) { k.begin(2*i+1, []byte{}, call("/etcdserverpb.KV/Unknown")...) },
		"calls of etcd": func(k *frameClient, i uint32) {
			k.begin(2*i+1, message(0, []byte("\x0a\x08/witness")), call(rangeMethod)...)
		},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMemorySite(t)
			m.grows(t, 300, func() {}, func() {
				var all bytes.Buffer // that each of them sends: this process must not be what is slow
				k := newFrameClient(nil)
				k.Framer = http2.NewFramer(&all, nil)
				for i := range uint32(20_000) {
					send(k, i)
				}
				m.serveBeside(t, func() *frameClient { return greet(t, m.plain) }, all.Bytes())
			})
		})
	}
	t.Run("bodies of HTTP requests", func(t *testing.T) {
		m := newMemorySite(t)
		request := unfinishedJSON(3_900_000)
		body := slices.Concat(request.front, bytes.Repeat([]byte("A"), request.size-len(request.front)))
		head := fmt.Sprintf("POST /v3/kv/put HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n", len(body)+2)
		m.serveBeside(t, func() *frameClient { return connect(t, m.plain) }, append([]byte(head), body...))
	})
}

// serveBeside fails if a call waits in the proxy for more than longestWait beside 200 clients that
// connect and send all.
func (m *memorySite) serveBeside(t *testing.T, connect func() *frameClient, all []byte) {
	t.Helper()
	waits := m.callsBesideSenders(t, connect, all, func() {})
	t.Logf("%d calls: the longest %v, %v in etcd alone, %v in the proxy", waits.calls, waits.longest, waits.etcd, waits.proxy)
	if waits.proxy > longestWait {
		t.Errorf("a call took %v in the proxy, limit %v", waits.proxy, longestWait)
	}
}

// waits are how long calls of honest clients take beside others.
type waits struct {
	calls   int
	longest time.Duration // of a call through the proxy
	etcd    time.Duration // of the same call, sent to the etcd behind the proxy at the same time
	proxy   time.Duration // of a call, what of it the proxy makes
}

// callsBesideSenders measures the calls of an honest client while 200 others send all. The machine
// is busy with the senders, etcd and perhaps with others, which no proxy can help, and its calls
// wait in etcd as well. So what counts as the proxy's part of a call is the time that the proxy's
// process has computed meanwhile, as if it had all cores, and no more than what the call takes
// longer than the longest that is sent to the same etcd directly. also runs once meanwhile.
func (m *memorySite) callsBesideSenders(t *testing.T, connect func() *frameClient, all []byte, also func()) (w waits) {
	t.Helper()
	senders := make([]*frameClient, 200)
	for i := range senders {
		senders[i] = connect()
	}
	through, direct := pb.NewKVClient(harness.Dial(t, m.plain, nil)), pb.NewKVClient(harness.Dial(t, m.behind.Address, nil))
	value := m.env.Sealed.Value("witness")
	for _, err := range []error{once(through, "/witness", value), once(direct, "/direct", "anything")} {
		if err != nil {
			t.Fatal(err)
		}
	}
	ctx, stop := context.WithTimeout(t.Context(), 5*time.Second)
	defer stop()
	var ended sync.WaitGroup
	defer ended.Wait()
	for _, k := range senders {
		ended.Go(func() {
			defer k.Close()
			_ = k.SetWriteDeadline(time.Now().Add(5 * time.Second))
			_, _ = k.Write(all)
			<-ctx.Done() // it stays connected
		})
	}
	type timed struct{ took, computed time.Duration }
	call := func(kv pb.KVClient, key, value string, i int) (c timed) {
		computed, begun := m.computed(t), time.Now()
		var err error
		if asking := context.WithoutCancel(ctx); i%2 == 0 {
			_, err = kv.Put(asking, &pb.PutRequest{Key: []byte(key), Value: []byte(value)})
		} else {
			_, err = kv.Range(asking, &pb.RangeRequest{Key: []byte(key)})
		}
		if err != nil {
			t.Errorf("%s: %v", key, err)
		}
		return timed{time.Since(begun), m.computed(t) - computed}
	}
	var sent sync.WaitGroup
	sent.Go(func() {
		for i := 0; ctx.Err() == nil; i++ {
			w.etcd = max(w.etcd, call(direct, "/direct", "anything", i).took)
			time.Sleep(2 * time.Millisecond) // it is not the load
		}
	})
	also()
	var calls []timed
	for i := 0; ctx.Err() == nil; i++ {
		calls = append(calls, call(through, "/witness", value, i))
		time.Sleep(2 * time.Millisecond)
	}
	sent.Wait()
	w.calls = len(calls)
	for _, c := range calls {
		w.longest = max(w.longest, c.took)
		w.proxy = max(w.proxy, min(c.computed/time.Duration(runtime.NumCPU()), c.took-w.etcd))
	}
	return w
}

// computed is how long the proxy has used a processor, of all its threads.
func (m *memorySite) computed(t *testing.T) time.Duration {
	t.Helper()
	const ofProcess = 2 // CPUCLOCK_SCHED, as clock_getcpuclockid names it
	var used unix.Timespec
	if err := unix.ClockGettime(int32(^m.proxy.PID()<<3|ofProcess), &used); err != nil {
		t.Errorf("read the processor time of the proxy: %v", err)
	}
	return time.Duration(used.Nano())
}
