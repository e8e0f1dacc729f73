package limits

import (
	"fmt"
	"strings"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestMemoryOfLists: a client lists 10,000 values of 1 KiB repeatedly. A list without values under
// a rule passes as it arrives. One under a rule is held until it is complete: 10 MiB.
func TestMemoryOfLists(t *testing.T) {
	const keys, size, lists = 10_000, 1 << 10, 20
	for name, test := range map[string]struct {
		prefix string // of the rule; it covers the keys of grows
		mib    int64
	}{
		"passing":   {"/", 8},
		"encrypted": {"", 33},
	} {
		t.Run(name, func(t *testing.T) {
			m := newMemorySite(t)
			m.proxy.Stop(10 * time.Second)
			cfg := m.config(m.behind.URL)
			cfg.Rules[0].Prefix = test.prefix
			cfg.Listeners = []harness.Listener{{Address: m.plain}}
			m.proxy = m.env.StartProxy("lists", cfg)
			m.proxy.WaitReady(30 * time.Second)
			kv := pb.NewKVClient(harness.Dial(t, m.plain, nil))
			value := []byte(strings.Repeat("v", size))
			for i := 0; i < keys; i += 100 {
				txn := new(pb.TxnRequest)
				for j := i; j < i+100; j++ {
					put := &pb.PutRequest{Key: fmt.Appendf(nil, "list/%05d", j), Value: value}
					txn.Success = append(txn.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put}})
				}
				if _, err := kv.Txn(t.Context(), txn); err != nil {
					t.Fatal(err)
				}
			}
			// What the writes have cost is not what is measured.
			m.proxy.Stop(10 * time.Second)
			m.proxy.Start()
			m.proxy.WaitReady(30 * time.Second)
			kv = pb.NewKVClient(harness.Dial(t, m.plain, nil))
			m.grows(t, test.mib, func() {}, func() {
				for range lists {
					res, err := kv.Range(t.Context(), &pb.RangeRequest{Key: []byte("list/"), RangeEnd: []byte("list0")}, grpc.MaxCallRecvMsgSize(2*keys*size))
					if err != nil || len(res.Kvs) != keys || len(res.Kvs[keys-1].Value) != size {
						t.Fatalf("a list of %d keys: %v", len(res.GetKvs()), err)
					}
				}
			})
		})
	}
}
