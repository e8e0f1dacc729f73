package limits

import (
	"context"
	"fmt"
	"testing"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/grpc"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/test/harness"
)

// TestLargeCompares: compares by VALUE over ranges of many keys, and more of them than etcd takes,
// are decided or refused as etcd does it, in bounded memory.
func TestLargeCompares(t *testing.T) {
	n := 20_000
	if testing.Short() {
		n = 4000
	}
	s := newSite(t, 0, nil)
	value := []byte(s.env.Sealed.Value("same"))
	for _, address := range s.sides() {
		kv := pb.NewKVClient(harness.Dial(t, address, nil))
		for i := 0; i < n; {
			txn := &pb.TxnRequest{}
			for ; i < n && len(txn.Success) < 128; i++ {
				put := &pb.PutRequest{Key: fmt.Appendf(nil, "/many/%06d", i), Value: value}
				txn.Success = append(txn.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: put}})
			}
			if _, err := kv.Txn(t.Context(), txn); err != nil {
				t.Fatal(err)
			}
		}
	}
	compare := func(key, end string, than []byte) *pb.Compare {
		return &pb.Compare{Key: []byte(key), RangeEnd: []byte(end), Target: pb.Compare_VALUE, TargetUnion: &pb.Compare_Value{Value: than}}
	}
	var several, tooMany []*pb.Compare
	for i := range 200 {
		c := compare(fmt.Sprintf("/many/%06d", i), "", value)
		if tooMany = append(tooMany, c); i < 100 {
			several = append(several, c)
		}
	}
	s.abused(t, 256<<20, func() {
		for what, compares := range map[string][]*pb.Compare{
			"every key, and it is so":     {compare("/many/", "/many0", value)},
			"every key, and it is not":    {compare("/many/", "/many0", []byte("other"))},
			"a hundred ranges":            append([]*pb.Compare{compare("/many/", "/many0", value)}, several[1:]...),
			"more compares than may be":   tooMany,
			"a range that ends before it": {compare("/many0", "/many/", value)},
		} {
			s.compare(t, what, func(conn *grpc.ClientConn) string {
				ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
				defer cancel()
				get := &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("/many/"), RangeEnd: []byte("/many0"), CountOnly: true}}}
				return says(pb.NewKVClient(conn).Txn(ctx, &pb.TxnRequest{Compare: compares, Success: []*pb.RequestOp{get}}))
			})
		}
	})
}
