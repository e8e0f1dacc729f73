package scale

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestValues writes many values, and reads all of them: by a watch from the first revision, by
// pages of 10,000 as Kubernetes does, in one response, and with status. Each value must come once,
// and the memory of the proxy must not depend on the number, except for the one response, which it
// holds until it is complete.
func TestValues(t *testing.T) {
	n := size(t, "SCALE_VALUES", 50_000, 10_000)
	env := harness.New(t)
	etcd := env.StartEtcd(harness.EtcdConfig{Flags: []string{"--quota-backend-bytes", "8589934592", "--log-level", "error"}})
	proxy := env.StartProxy("proxy", harness.ProxyConfig{
		Etcd: harness.Upstream{Endpoints: []string{etcd.URL}}, KMS: []harness.KMSConfig{env.LocalKey("dev", 1)},
		Rules: []harness.Rule{{Prefix: prefix, WriteWith: "dev", AllowPlaintextReads: new(false)}}, Log: harness.LogConfig{Level: "info"},
	})
	proxy.WaitReady(within)
	conn := harness.Dial(t, proxy.Address, nil)
	kv := pb.NewKVClient(conn)
	// measured restarts the proxy, so that each step has its own peak.
	measured := func(what string, most int64, step func()) {
		t.Helper()
		begun := time.Now()
		step()
		took, used := time.Since(begun), peak(t, proxy.PID())
		t.Logf("%s: %v, %d MiB at most", what, took.Round(time.Millisecond), used>>20)
		if used > most {
			t.Errorf("%s takes %d MiB, more than %d", what, used>>20, most>>20)
		}
		if !proxy.Stop(within) {
			t.Error("the proxy does not end")
		}
		proxy.Start()
		proxy.WaitReady(within)
	}
	var name, value func(int) string
	measured(fmt.Sprintf("%d values written", n), 128<<20, func() { name, value = fill(t, env, kv, n) })

	// check counts a pair, of which each must come once.
	have := make([]bool, n)
	check := func(key, got string) {
		t.Helper()
		_, number, _ := strings.Cut(key, "/name-")
		i, err := strconv.Atoi(number)
		switch {
		case err != nil || i >= n || name(i) != key:
			t.Fatalf("a key that was not written: %s", key)
		case have[i]:
			t.Fatalf("%s comes twice", key)
		case got != value(i):
			t.Fatalf("%s has another value than was written", key)
		}
		have[i] = true
	}
	complete := func() {
		t.Helper()
		missing := 0
		for i := range have {
			if !have[i] {
				missing++
			}
			have[i] = false
		}
		if missing > 0 {
			t.Errorf("%d of %d values are missing", missing, n)
		}
	}
	// etcd sends up to 1,000 revisions in one response, and each of them has 100 keys here.
	measured("a watch from the first revision", int64(min(n, 100_000))*5<<10+128<<20, func() {
		stream, err := pb.NewWatchClient(conn).Watch(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := stream.Send(&pb.WatchRequest{RequestUnion: &pb.WatchRequest_CreateRequest{CreateRequest: &pb.WatchCreateRequest{
			Key: []byte(prefix), RangeEnd: []byte("/s0"), StartRevision: 1,
		}}}); err != nil {
			t.Fatal(err)
		}
		for events := 0; events < n; {
			r, err := stream.Recv()
			if err != nil || r.Canceled {
				t.Fatalf("after %d events: %v, %v", events, r, err)
			}
			for _, e := range r.Events {
				check(string(e.Kv.Key), string(e.Kv.Value))
				events++
			}
		}
		if err := stream.CloseSend(); err != nil {
			t.Error(err)
		}
	})
	complete()
	measured("a list in pages of 10,000", 192<<20, func() {
		for from, revision := prefix, int64(0); ; {
			page, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte(from), RangeEnd: []byte("/s0"), Limit: 10_000, Revision: revision})
			if err != nil {
				t.Fatal(err)
			}
			for _, pair := range page.Kvs {
				check(string(pair.Key), string(pair.Value))
				from = string(pair.Key) + "\x00"
			}
			if revision = page.Header.Revision; !page.More {
				break
			}
		}
	})
	complete()
	var answer int64
	measured("a list in one response", int64(n)*2048+192<<20, func() {
		all, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte(prefix), RangeEnd: []byte("/s0")})
		if err != nil {
			t.Fatal(err)
		}
		for _, pair := range all.Kvs {
			check(string(pair.Key), string(pair.Value))
			answer += int64(len(pair.Key) + len(pair.Value))
		}
	})
	complete()
	t.Logf("the response has %d MiB of keys and values", answer>>20)

	begun := time.Now()
	status := env.Spawn("status", "status", "--config", proxy.ConfigFile, "--output", "json")
	used := status.Peak()
	if code := status.Wait(10 * time.Minute); code != 0 {
		t.Fatalf("status: exit code %d: %s", code, status.Log())
	}
	var report struct{ Rules []struct{ Keys, Current int } }
	if err := json.Unmarshal([]byte(status.Log()), &report); err != nil || len(report.Rules) != 1 || report.Rules[0].Keys != n || report.Rules[0].Current != n {
		t.Errorf("status: %v, %+v, want %d keys, all current", err, report, n)
	}
	t.Logf("status: %v, %d MiB at most", time.Since(begun).Round(time.Millisecond), used>>20)
	if used > 60<<20 {
		t.Errorf("status takes %d MiB, more than 60", used>>20)
	}
}

func get(t *testing.T, url string) string {
	t.Helper()
	response, err := http.Get(url)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}
