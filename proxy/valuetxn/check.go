package valuetxn

import (
	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// maxTxnOps is etcd's default for --max-txn-ops.
const maxTxnOps = 128

// CheckPut returns the error that etcd has for a put, or nil.
func CheckPut(p *pb.PutRequest) error {
	switch {
	case len(p.GetKey()) == 0:
		return rpctypes.ErrGRPCEmptyKey
	case p.GetIgnoreValue() && len(p.GetValue()) > 0:
		return rpctypes.ErrGRPCValueProvided
	case p.GetIgnoreLease() && p.GetLease() != 0:
		return rpctypes.ErrGRPCLeaseProvided
	}
	return nil
}

// checkTxn returns an error for a transaction that etcd refuses whatever its keys hold, if each of
// its lists may have left operations, and those of nested ones so many fewer. What only some
// versions of etcd refuse, as an unknown order, it does not look for, nor for keys that are written
// twice.
func checkTxn(t *pb.TxnRequest, left int) error {
	widest := max(len(t.GetCompare()), len(t.GetSuccess()), len(t.GetFailure()))
	if widest > left {
		return rpctypes.ErrGRPCTooManyOps
	}
	for _, c := range t.GetCompare() {
		if len(c.GetKey()) == 0 {
			return rpctypes.ErrGRPCEmptyKey
		}
	}
	for _, ops := range [][]*pb.RequestOp{t.GetSuccess(), t.GetFailure()} {
		for _, op := range ops {
			if err := checkOp(op, left-widest); err != nil {
				return err
			}
		}
	}
	return nil
}

func checkOp(op *pb.RequestOp, left int) error {
	switch o := op.GetRequest().(type) {
	case *pb.RequestOp_RequestRange:
		if len(o.RequestRange.GetKey()) == 0 {
			return rpctypes.ErrGRPCEmptyKey
		}
	case *pb.RequestOp_RequestDeleteRange:
		if len(o.RequestDeleteRange.GetKey()) == 0 {
			return rpctypes.ErrGRPCEmptyKey
		}
	case *pb.RequestOp_RequestPut:
		return CheckPut(o.RequestPut)
	case *pb.RequestOp_RequestTxn:
		return checkTxn(o.RequestTxn, left)
	default:
		return rpctypes.ErrGRPCKeyNotFound
	}
	return nil
}
