package etcdapi

import (
	"context"
	"fmt"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdmodel"
)

// TestComparesAreBounded: how often etcd is requested one transaction grows with its depth and with
// the keys that it compares, not with the nested transactions in it.
func TestComparesAreBounded(t *testing.T) {
	compare := func(key, end string) *pb.Compare {
		return &pb.Compare{Target: pb.Compare_VALUE, Key: []byte(key), RangeEnd: []byte(end), TargetUnion: &pb.Compare_Value{Value: []byte("v")}}
	}
	read := []*pb.RequestOp{{Request: &pb.RequestOp_RequestRange{RequestRange: &pb.RangeRequest{Key: []byte("s/0")}}}}
	nest := func(txns ...*pb.TxnRequest) (ops []*pb.RequestOp) {
		for _, txn := range txns {
			ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: txn}})
		}
		return ops
	}
	wide := func(n, keys int, end string, then []*pb.RequestOp) *pb.TxnRequest {
		var all []*pb.TxnRequest
		for i := range n {
			all = append(all, &pb.TxnRequest{Compare: []*pb.Compare{compare(fmt.Sprintf("s/%d", i%keys), end)}, Success: then})
		}
		return &pb.TxnRequest{Success: nest(all...)}
	}
	const unlimited = 1 << 20
	tooMany, tooMuch := status.Convert(rpctypes.ErrGRPCTooManyOps).Message(), "etcd-kms-proxy: values under a rule are compared here, and that is done for transactions with at most 1000 compares, 128 of them of ranges: compare fewer"
	for name, tt := range map[string]struct {
		txn   *pb.TxnRequest
		limit int // etcd's
		asked int // at most
		code  codes.Code
		text  string
	}{
		"more than etcd takes":            {wide(20_000, 20_000, "", read), 128, 2, codes.InvalidArgument, tooMany},
		"more than is compared":           {wide(20_000, 20_000, "", read), unlimited, 2, codes.ResourceExhausted, tooMuch},
		"more of ranges":                  {wide(200, 200, "s0", read), unlimited, 2, codes.ResourceExhausted, tooMuch},
		"many":                            {wide(900, 900, "", read), unlimited, 2 + 8 + 1, codes.OK, ""},
		"many of few keys":                {wide(900, 5, "", read), unlimited, 2 + 1 + 1, codes.OK, ""},
		"as many as etcd takes":           {wide(126, 126, "", read), 128, 1 + 1, codes.OK, ""},
		"deep":                            {wide(9, 9, "", nest(wide(9, 9, "", nest(wide(9, 9, "", read))))), 128, 3 + 1, codes.OK, ""},
		"an etcd with a limit of its own": {wide(12, 12, "", read), 16, 1 + 1, codes.OK, ""},
	} {
		t.Run(name, func(t *testing.T) {
			w := newCallWorld(t)
			w.Behind, w.Bare = etcdmodel.New(tt.limit, etcdmodel.Leases...), etcdmodel.New(tt.limit, etcdmodel.Leases...)
			for i := range 12 { // the others are not there
				if err := w.Step(etcdmodel.Step{Request: &pb.PutRequest{Key: fmt.Appendf(nil, "s/%d", i), Value: []byte("v")}}); err != nil {
					t.Fatal(err)
				}
			}
			if tt.code == codes.OK {
				_ = w.Step(etcdmodel.Step{Request: tt.txn}) // a difference ends the test
			} else {
				w.Asked = 0
				_, err := w.through(context.Background(), "Txn", tt.txn)
				if st := status.Convert(err); st.Code() != tt.code || st.Message() != tt.text {
					t.Errorf("got %v", err)
				}
			}
			if w.Asked > tt.asked {
				t.Errorf("etcd was asked %d times, want %d at most", w.Asked, tt.asked)
			}
		})
	}
}
