package etcdapi

import (
	"fmt"
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/testing/etcdmodel"
)

// TestTxnLimits: what etcd says of a transaction that is too much, or wrong in several ways, it
// says through the proxy, too, however the parts of it are sent.
func TestTxnLimits(t *testing.T) {
	compares := func(n int, target pb.Compare_CompareTarget) (all []*pb.Compare) {
		for i := range n {
			all = append(all, &pb.Compare{Target: target, Key: fmt.Appendf(nil, "s/%d", i)})
		}
		return all
	}
	ranges := func(n int, serializable bool) (all []*pb.RequestOp) {
		for i := range n {
			r := &pb.RangeRequest{Key: fmt.Appendf(nil, "s/%d", i), Serializable: serializable}
			all = append(all, &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}})
		}
		return all
	}
	nested := func(n int) []*pb.RequestOp {
		return []*pb.RequestOp{{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Success: ranges(n, false), Failure: ranges(1, false)}}}}
	}
	same := func(key string) (twice []*pb.RequestOp) {
		for range 2 {
			twice = append(twice, &pb.RequestOp{Request: &pb.RequestOp_RequestPut{RequestPut: &pb.PutRequest{Key: []byte(key)}}})
		}
		return twice
	}
	nothing := []*pb.RequestOp{{}}
	const value, version, limit = pb.Compare_VALUE, pb.Compare_VERSION, etcdmodel.MaxOps
	for name, r := range map[string]*pb.TxnRequest{
		"the other branch, to the limit":              {Compare: compares(limit-2, value), Success: nested(2)},
		"the other branch, over the limit":            {Compare: compares(limit, value), Success: nested(1)},
		"the chosen branch, to the limit":             {Compare: compares(1, value), Failure: nested(limit - 3), Success: ranges(3, false)},
		"the chosen branch, over it by the other one": {Compare: compares(1, value), Failure: nested(limit - 2), Success: ranges(3, false)},
		"serializable, over the limit":                {Compare: append(compares(limit, version), &pb.Compare{Target: value, Key: []byte("s/"), RangeEnd: []byte("s0")}), Success: ranges(1, true)},
		"a wrong one to the limit":                    {Compare: compares(limit-1, value), Success: append(nested(1), nothing...)},
		"too much, and something wrong in the branch that is chosen": {
			Compare: compares(1, version),
			Success: []*pb.RequestOp{{Request: &pb.RequestOp_RequestTxn{RequestTxn: &pb.TxnRequest{Compare: compares(limit, value), Success: nested(1)}}}},
			Failure: nothing,
		},
		"too many compares, one without a key": {Compare: append([]*pb.Compare{{}}, compares(limit, value)...)},
		"one key twice, and nothing to do":     {Compare: compares(1, value), Success: same("s/x"), Failure: nothing},
		"nothing to do, and one key twice":     {Compare: compares(1, value), Success: nothing, Failure: same("s/x")},
		"keys twice in both":                   {Compare: compares(1, value), Success: same("s/x"), Failure: same("s/y")},
	} {
		t.Run(name, func(t *testing.T) { newCallWorld(t).Step(etcdmodel.Step{Request: r}) })
	}
}
