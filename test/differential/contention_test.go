package differential

import (
	"context"
	"fmt"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestContention has 64 clients, half of them through each of two proxies, increment one key by
// compares of its VALUE until each has done its share. No increment may be lost or applied twice,
// and every client must make progress.
func TestContention(t *testing.T) {
	t.Parallel()
	b := newBench(t, "3.7", ruleSets[0])
	if b.proxy == nil {
		t.Skip("it is about the proxy")
	}
	cfg := b.proxy.Config
	cfg.Listeners, cfg.Admin = nil, harness.Admin{}
	other := b.env.StartProxy("other", cfg)
	other.WaitReady(30 * time.Second)
	const clients, share = 64, 10
	key, marker := []byte("/s/counter"), b.env.Sealed.Value("")
	kvs := []pb.KVClient{b.via.kv, pb.NewKVClient(harness.Dial(t, other.Address, nil))}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	if _, err := kvs[0].Put(ctx, &pb.PutRequest{Key: key, Value: []byte(marker + "0")}); err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	for c := range clients {
		kv := kvs[c%2]
		all.Go(func() {
			for done := 0; done < share; {
				added, err := countUp(ctx, kv, key, marker)
				if err != nil {
					t.Errorf("client %d after %d of %d: %v", c, done, share, err)
					return
				}
				done += added
			}
		})
	}
	all.Wait()
	now, err := kvs[0].Range(ctx, &pb.RangeRequest{Key: key})
	if err != nil {
		t.Fatal(err)
	}
	if got, want := string(now.Kvs[0].Value), marker+strconv.Itoa(clients*share); got != want || now.Kvs[0].Version != clients*share+1 {
		t.Errorf("%s in %d versions, want %s", got, now.Kvs[0].Version, want)
	}
}

// countUp increments the number if the value is still the same.
func countUp(ctx context.Context, kv pb.KVClient, key []byte, marker string) (int, error) {
	now, err := kv.Range(ctx, &pb.RangeRequest{Key: key})
	if err != nil {
		return 0, err
	}
	old := now.Kvs[0].Value
	n, err := strconv.Atoi(strings.TrimPrefix(string(old), marker))
	if err != nil {
		return 0, err
	}
	put := &pb.PutRequest{Key: key, Value: []byte(marker + strconv.Itoa(n+1))}
	answer, err := kv.Txn(ctx, &pb.TxnRequest{
		Compare: []*pb.Compare{{Key: key, Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: old}}},
		Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestPut{RequestPut: put}}},
	})
	if err != nil || !answer.Succeeded {
		return 0, err
	}
	return 1, nil
}

// TestLargeSort checks that a sort that would take too much memory is refused with a hint, and that
// a sort of fewer keys works.
func TestLargeSort(t *testing.T) {
	t.Parallel()
	b := newBench(t, "3.7", ruleSets[0])
	if b.proxy == nil {
		t.Skip("it is about the proxy")
	}
	ctx := t.Context()
	value := []byte(b.env.Sealed.Value(strings.Repeat("v", 1<<20)))
	for i := range 70 {
		if _, err := b.via.kv.Put(ctx, &pb.PutRequest{Key: fmt.Appendf(nil, "/s/%02d", i), Value: value}); err != nil {
			t.Fatal(err)
		}
	}
	r := &pb.RangeRequest{Key: []byte("/s/"), RangeEnd: []byte("/s0"), SortTarget: pb.RangeRequest_VALUE, SortOrder: pb.RangeRequest_DESCEND, Limit: 1}
	_, err := b.via.kv.Range(ctx, r)
	if st := status.Convert(err); st.Code() != codes.ResourceExhausted || !strings.Contains(st.Message(), "for answers of 64 MiB at most: ask for fewer keys") {
		t.Errorf("%v", err)
	}
	r.RangeEnd = []byte("/s/5")
	if answer, err := b.via.kv.Range(ctx, r); err != nil || len(answer.Kvs) != 1 || !answer.More {
		t.Errorf("%v, %v", answer.GetMore(), err)
	}
	// A compare reads a range page by page.
	compare := &pb.Compare{Key: []byte("/s/"), RangeEnd: []byte("/s0"), Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: value}}
	if answer, err := b.via.kv.Txn(ctx, &pb.TxnRequest{Compare: []*pb.Compare{compare}}); err != nil || !answer.Succeeded {
		t.Errorf("%v, %v", answer.GetSucceeded(), err)
	}
}
