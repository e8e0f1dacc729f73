package etcdmodel

import (
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

// txnOnce checks the request, then decides all compares, then checks what the branches taken find,
// and then only does anything.
func (w *writing) txnOnce(r *pb.TxnRequest) (*pb.TxnResponse, error) {
	if err := checkTxn(r, w.maxOps); err != nil {
		return nil, err
	}
	for _, branch := range [][]*pb.RequestOp{r.GetSuccess(), r.GetFailure()} {
		if _, err := writes(branch); err != nil {
			return nil, err
		}
	}
	taken := make(map[*pb.TxnRequest]bool)
	w.decide(r, taken)
	if err := w.checkTxnNow(r, taken); err != nil {
		return nil, err
	}
	answer := w.txn(r, taken)
	answer.Header = w.header()
	w.end()
	return answer, nil
}

func checkPut(r *pb.PutRequest) error {
	switch {
	case len(r.GetKey()) == 0:
		return rpctypes.ErrGRPCEmptyKey
	case r.GetIgnoreValue() && len(r.GetValue()) > 0:
		return rpctypes.ErrGRPCValueProvided
	case r.GetIgnoreLease() && r.GetLease() != 0:
		return rpctypes.ErrGRPCLeaseProvided
	}
	return nil
}

// checkTxn gives nested transactions what is left of the limit.
func checkTxn(r *pb.TxnRequest, maxOps int) error {
	most := max(len(r.GetCompare()), len(r.GetSuccess()), len(r.GetFailure()))
	if most > maxOps {
		return rpctypes.ErrGRPCTooManyOps
	}
	for _, c := range r.GetCompare() {
		if len(c.GetKey()) == 0 {
			return rpctypes.ErrGRPCEmptyKey
		}
	}
	for _, op := range slices.Concat(r.GetSuccess(), r.GetFailure()) {
		var err error
		switch o := op.GetRequest().(type) {
		case *pb.RequestOp_RequestRange:
			err = checkRange(o.RequestRange)
		case *pb.RequestOp_RequestPut:
			err = checkPut(o.RequestPut)
		case *pb.RequestOp_RequestDeleteRange:
			if len(o.RequestDeleteRange.GetKey()) == 0 {
				err = rpctypes.ErrGRPCEmptyKey
			}
		case *pb.RequestOp_RequestTxn:
			err = checkTxn(o.RequestTxn, maxOps-most)
		default:
			err = rpctypes.ErrGRPCKeyNotFound
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// written is what the operations of a branch and of all within them may write.
type written struct {
	puts    map[string]bool
	deletes []*pb.DeleteRangeRequest
}

// deleted does not see that a range meets anything whose end says that there is none: neither does
// etcd.
func (w *written) deleted(key string) bool {
	return slices.ContainsFunc(w.deletes, func(r *pb.DeleteRangeRequest) bool {
		return string(r.GetRangeEnd()) != "\x00" && within(key, string(r.GetKey()), string(r.GetRangeEnd()))
	})
}

// writes refuses a key that is put twice, or put and deleted. The two branches of a nested
// transaction may put one key, since one alone is taken; and of two nested transactions the second
// may delete what the first puts.
func writes(ops []*pb.RequestOp) (*written, error) {
	all := &written{puts: make(map[string]bool)}
	for _, op := range ops {
		if d := op.GetRequestDeleteRange(); d != nil {
			all.deletes = append(all.deletes, d)
		}
	}
	for _, op := range ops {
		nested := op.GetRequestTxn()
		if nested == nil {
			continue
		}
		success, err := writes(nested.GetSuccess())
		if err != nil {
			return nil, err
		}
		failure, err := writes(nested.GetFailure())
		if err != nil {
			return nil, err
		}
		for _, branch := range []*written{success, failure} {
			for key := range branch.puts {
				if all.puts[key] && (branch == success || !success.puts[key]) || all.deleted(key) {
					return nil, rpctypes.ErrGRPCDuplicateKey
				}
			}
			for key := range branch.puts {
				all.puts[key] = true
			}
		}
		all.deletes = slices.Concat(all.deletes, success.deletes, failure.deletes)
	}
	for _, op := range ops {
		if p := op.GetRequestPut(); p != nil {
			if key := string(p.GetKey()); all.puts[key] || all.deleted(key) {
				return nil, rpctypes.ErrGRPCDuplicateKey
			} else {
				all.puts[key] = true
			}
		}
	}
	return all, nil
}

func (w *writing) decide(r *pb.TxnRequest, taken map[*pb.TxnRequest]bool) {
	taken[r] = !slices.ContainsFunc(r.GetCompare(), func(c *pb.Compare) bool { return !w.compare(c) })
	for _, op := range branch(r, taken) {
		if nested := op.GetRequestTxn(); nested != nil {
			w.decide(nested, taken)
		}
	}
}

func branch(r *pb.TxnRequest, taken map[*pb.TxnRequest]bool) []*pb.RequestOp {
	if taken[r] {
		return r.GetSuccess()
	}
	return r.GetFailure()
}

func (w *writing) checkTxnNow(r *pb.TxnRequest, taken map[*pb.TxnRequest]bool) error {
	for _, op := range branch(r, taken) {
		var err error
		switch o := op.GetRequest().(type) {
		case *pb.RequestOp_RequestRange:
			err = w.checkRangeNow(o.RequestRange)
		case *pb.RequestOp_RequestPut:
			err = w.checkPutNow(o.RequestPut)
		case *pb.RequestOp_RequestTxn:
			err = w.checkTxnNow(o.RequestTxn, taken)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// txn does what was decided. The header of a nested answer is empty.
func (w *writing) txn(r *pb.TxnRequest, taken map[*pb.TxnRequest]bool) *pb.TxnResponse {
	answer := &pb.TxnResponse{Header: &pb.ResponseHeader{}, Succeeded: taken[r]}
	for _, op := range branch(r, taken) {
		done := &pb.ResponseOp{}
		switch o := op.GetRequest().(type) {
		case *pb.RequestOp_RequestRange:
			done.Response = &pb.ResponseOp_ResponseRange{ResponseRange: w.ranged(o.RequestRange)}
		case *pb.RequestOp_RequestPut:
			done.Response = &pb.ResponseOp_ResponsePut{ResponsePut: w.put(o.RequestPut)}
		case *pb.RequestOp_RequestDeleteRange:
			done.Response = &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: w.deleteRange(o.RequestDeleteRange)}
		case *pb.RequestOp_RequestTxn:
			done.Response = &pb.ResponseOp_ResponseTxn{ResponseTxn: w.txn(o.RequestTxn, taken)}
		}
		answer.Responses = append(answer.Responses, done)
	}
	return answer
}
