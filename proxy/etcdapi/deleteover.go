package etcdapi

import (
	"fmt"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/valuetxn"
)

// A delete of a range that reaches over keys of the proxies' own, as one of everything does, leaves
// these alone: etcd is asked to delete what is before and after them, in one transaction. The
// client sees the response of one delete. In a transaction of the client's, they stand where the
// delete was: not in a nested one, since etcd does not compare what siblings write.

// parts are the deletes that are sent for one that reaches over own keys.
func (o ownKeys) parts(d *pb.DeleteRangeRequest) []*pb.RequestOp {
	var ops []*pb.RequestOp
	for _, s := range o.without(d.GetKey(), d.GetRangeEnd()) {
		part, _ := proto.Clone(d).(*pb.DeleteRangeRequest)
		part.Key, part.RangeEnd = s.key, s.end
		ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: part}})
	}
	return ops
}

// over returns the delete in op if it reaches over own keys, and else nil.
func (o ownKeys) over(op *pb.RequestOp) *pb.DeleteRangeRequest {
	if d := op.GetRequestDeleteRange(); d != nil && o.reach(d.GetKey(), d.GetRangeEnd()) == reachesOver {
		return d
	}
	return nil
}

// leaveOut puts the parts in the place of every delete in txn that reaches over own keys.
func (o ownKeys) leaveOut(txn *pb.TxnRequest) {
	for _, ops := range []*[]*pb.RequestOp{&txn.Success, &txn.Failure} {
		var all []*pb.RequestOp
		for _, op := range *ops {
			if d := o.over(op); d != nil {
				all = append(all, o.parts(d)...)
				continue
			}
			if nested := op.GetRequestTxn(); nested != nil {
				o.leaveOut(nested)
			}
			all = append(all, op)
		}
		*ops = all
	}
}

// putBack undoes leaveOut in the response to a transaction that a client requested.
func (o ownKeys) putBack(request *pb.TxnRequest, response *pb.TxnResponse) error {
	var all []*pb.ResponseOp
	rest := response.GetResponses()
	for _, op := range valuetxn.Branch(request, response.GetSucceeded()) {
		d, n := o.over(op), 1
		if d != nil {
			n = len(o.without(d.GetKey(), d.GetRangeEnd()))
		}
		if len(rest) < n {
			return fmt.Errorf("%w: there are fewer answers than operations", etcdwire.ErrMalformed)
		}
		one := rest[0]
		if d != nil {
			joined, err := joinedDeletes(rest[:n])
			if err != nil {
				return err
			}
			one = &pb.ResponseOp{Response: &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: joined}}
		} else if nested := op.GetRequestTxn(); nested != nil {
			if err := o.putBack(nested, one.GetResponseTxn()); err != nil {
				return err
			}
		}
		all, rest = append(all, one), rest[n:]
	}
	if response != nil {
		response.Responses = all
	}
	return nil
}
