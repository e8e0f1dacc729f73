package etcdapi

import (
	"context"
	"fmt"
	"math"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/valuetxn"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

// A delete of a range that reaches over keys of the proxies' own, as one of everything does, leaves
// these alone: etcd is asked to delete what is before and after them, in one transaction. The
// client sees the answer of one delete. In a transaction of the client's, they stand where the
// delete was: not in a nested one, since etcd does not compare what siblings write.

func (c *deleteCall) Exchanges() bool { return c.over }

// exchange implements exchanger.
func (c *deleteCall) exchange(ctx context.Context, msg []byte, ask sendFunc) ([]byte, error) {
	asked := new(pb.DeleteRangeRequest)
	if err := rpc.Unmarshal(msg, asked); err != nil {
		return nil, c.core.status(err, false)
	}
	answer, err := store{&c.kvCall, ask}.Txn(ctx, &pb.TxnRequest{Success: c.at.Own.Parts(asked)}, math.MaxInt32)
	if err != nil {
		return nil, err
	}
	all, err := joinedDeletes(answer.GetResponses())
	if err != nil {
		return nil, c.core.status(err, true)
	}
	all.Header = answer.GetHeader()
	out, err := rpc.Marshal(all)
	return out, c.core.status(err, true)
}

// Parts are the deletes that are sent for one that reaches over own keys.
func (o ownKeys) Parts(d *pb.DeleteRangeRequest) []*pb.RequestOp {
	var ops []*pb.RequestOp
	for _, s := range o.without(d.GetKey(), d.GetRangeEnd()) {
		part, _ := proto.Clone(d).(*pb.DeleteRangeRequest)
		part.Key, part.RangeEnd = s.key, s.end
		ops = append(ops, &pb.RequestOp{Request: &pb.RequestOp_RequestDeleteRange{RequestDeleteRange: part}})
	}
	return ops
}

// joinedDeletes makes one answer of those to parts. Its header is that of the last, which has the revision
// after all of them.
func joinedDeletes(answers []*pb.ResponseOp) (*pb.DeleteRangeResponse, error) {
	all := new(pb.DeleteRangeResponse)
	for _, part := range answers {
		one := part.GetResponseDeleteRange()
		if one == nil {
			return nil, fmt.Errorf("%w: it is about something else than deletes", etcdwire.ErrMalformed)
		}
		all.Header = one.GetHeader()
		all.Deleted += one.GetDeleted()
		all.PrevKvs = append(all.PrevKvs, one.GetPrevKvs()...)
	}
	return all, nil
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
				all = append(all, o.Parts(d)...)
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

// putBack undoes leaveOut in the answer to a transaction that a client asked for.
func (o ownKeys) putBack(asked *pb.TxnRequest, answer *pb.TxnResponse) error {
	var all []*pb.ResponseOp
	rest := answer.GetResponses()
	for _, op := range valuetxn.Branch(asked, answer.GetSucceeded()) {
		d, n := o.over(op), 1
		if d != nil {
			n = len(o.without(d.GetKey(), d.GetRangeEnd()))
		}
		if len(rest) < n {
			return fmt.Errorf("%w: there are fewer answers than operations", etcdwire.ErrMalformed)
		}
		one := rest[0]
		if d != nil {
			whole, err := joinedDeletes(rest[:n])
			if err != nil {
				return err
			}
			one = &pb.ResponseOp{Response: &pb.ResponseOp_ResponseDeleteRange{ResponseDeleteRange: whole}}
		} else if nested := op.GetRequestTxn(); nested != nil {
			if err := o.putBack(nested, one.GetResponseTxn()); err != nil {
				return err
			}
		}
		all, rest = append(all, one), rest[n:]
	}
	if answer != nil {
		answer.Responses = all
	}
	return nil
}
