package linear

import (
	"context"
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

// TestStale holds back what a proxy has read for a transaction that compares values, until it is
// outdated: the transaction must not be decided by it.
func TestStale(t *testing.T) {
	t.Parallel()
	s := &site{Env: harness.New(t)}
	etcd := s.StartEtcd(harness.EtcdConfig{})
	link := s.StartRelay(etcd.Address)
	kms := s.LocalKey("dev", 1)
	var kvs []pb.KVClient
	for n, url := range []string{link.URL, etcd.URL} {
		p := s.StartProxy(fmt.Sprintf("proxy-%d", n), harness.ProxyConfig{
			Etcd: harness.Upstream{Endpoints: []string{url}}, KMS: []harness.KMSConfig{kms}, Coordination: harness.NoCoordination(),
			Rules: []harness.Rule{{Prefix: "/s/", WriteWith: "dev", AllowPlaintextReads: new(false)}},
		})
		p.WaitReady(within)
		kvs = append(kvs, pb.NewKVClient(harness.Dial(t, p.Address, nil)))
	}
	slow, fast := kvs[0], kvs[1]
	ctx, cancel := context.WithTimeout(t.Context(), within)
	defer cancel()
	put := func(key, value string) int64 {
		t.Helper()
		set := s.Sealed
		if strings.HasPrefix(key, "/u/") {
			set = s.Clear
		}
		r, err := fast.Put(ctx, &pb.PutRequest{Key: []byte(key), Value: []byte(set.Value(value))})
		if err != nil {
			t.Fatal(err)
		}
		return r.Header.Revision
	}
	remove := func(key string) {
		t.Helper()
		if _, err := fast.DeleteRange(ctx, &pb.DeleteRangeRequest{Key: []byte(key)}); err != nil {
			t.Fatal(err)
		}
	}
	value := func(result pb.Compare_CompareResult, value string) *pb.Compare {
		return &pb.Compare{Key: []byte("/s/register"), Target: pb.Compare_VALUE, Result: result, TargetUnion: &pb.Compare_Value{Value: []byte(s.Sealed.Value(value))}}
	}
	fence := func(key string, token int64) *pb.Compare {
		return &pb.Compare{Key: []byte(key), Target: pb.Compare_CREATE, TargetUnion: &pb.Compare_CreateRevision{CreateRevision: token}}
	}
	for name, tt := range map[string]struct {
		compare func() []*pb.Compare // after the register was written with "a"
		then    func()
		holds   bool
	}{
		"the value is written": {
			func() []*pb.Compare { return []*pb.Compare{value(pb.Compare_EQUAL, "a")} },
			func() { put("/s/register", "b") }, false,
		},
		"the value is written back": {
			func() []*pb.Compare { return []*pb.Compare{value(pb.Compare_EQUAL, "a")} },
			func() { put("/s/register", "b"); put("/s/register", "a") }, true,
		},
		"the value becomes the one that was asked for": {
			func() []*pb.Compare { return []*pb.Compare{value(pb.Compare_EQUAL, "b")} },
			func() { put("/s/register", "b") }, true,
		},
		"the value becomes another than the one that was asked not to be": {
			func() []*pb.Compare { return []*pb.Compare{value(pb.Compare_NOT_EQUAL, "a")} },
			func() { put("/s/register", "b") }, true,
		},
		"the register goes": {
			func() []*pb.Compare { return []*pb.Compare{value(pb.Compare_EQUAL, "a")} },
			func() { remove("/s/register") }, false,
		},
		"the lock goes": {
			func() []*pb.Compare {
				return []*pb.Compare{fence("/s/lock", put("/s/lock", "")), value(pb.Compare_EQUAL, "a")}
			},
			func() { remove("/s/lock") }, false,
		},
		"a lock under no rule goes, and is taken by another": {
			func() []*pb.Compare {
				return []*pb.Compare{value(pb.Compare_EQUAL, "a"), fence("/u/lock", put("/u/lock", ""))}
			},
			func() { remove("/u/lock"); put("/u/lock", "") }, false,
		},
		"the lock is given": {
			func() []*pb.Compare { return []*pb.Compare{fence("/s/lock", 0), value(pb.Compare_EQUAL, "a")} },
			func() { remove("/s/lock") }, true,
		},
	} {
		put("/s/register", "a")
		if name == "the lock is given" {
			put("/s/lock", "")
		}
		request := &pb.TxnRequest{
			Compare: tt.compare(),
			Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte("/s/register"), Value: []byte(s.Sealed.Value("won"))}}}},
			Failure: []*pb.RequestOp{read("/s/register")},
		}
		before := transactions(t, etcd)
		link.Set(harness.ResponsesFrozen)
		type result struct {
			*pb.TxnResponse
			error
		}
		ended := make(chan result, 1)
		go func() {
			r, err := slow.Txn(ctx, request)
			ended <- result{r, err}
		}()
		harness.Eventually(t, within, "the proxy's read", func() error {
			if n := transactions(t, etcd); n != before+1 {
				return fmt.Errorf("%d transactions", n-before)
			}
			return nil
		})
		tt.then()
		link.Set(harness.Whole)
		switch r := <-ended; {
		case r.error != nil:
			t.Errorf("%s: %v", name, r.error)
		case r.Succeeded != tt.holds:
			t.Errorf("%s: the compare was answered with %t", name, r.Succeeded)
		}
		now, err := fast.Range(ctx, &pb.RangeRequest{Key: []byte("/s/register")})
		if err != nil {
			t.Fatal(err)
		}
		if won := len(now.Kvs) > 0 && string(now.Kvs[0].Value) == s.Sealed.Value("won"); won != tt.holds {
			t.Errorf("%s: the write was done: %t", name, won)
		}
	}
}

// transactions returns how many transactions etcd has answered.
func transactions(t *testing.T, etcd *harness.Etcd) int {
	t.Helper()
	client := http.Client{Timeout: 5 * time.Second}
	r, err := client.Get(etcd.URL + "/metrics")
	if err != nil {
		t.Fatal(err)
	}
	defer r.Body.Close()
	all, err := io.ReadAll(r.Body)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for line := range strings.Lines(string(all)) {
		if strings.HasPrefix(line, "grpc_server_handled_total{") && strings.Contains(line, `grpc_method="Txn"`) {
			fields := strings.Fields(line)
			count, _ := strconv.ParseFloat(fields[len(fields)-1], 64)
			n += int(count)
		}
	}
	return n
}
