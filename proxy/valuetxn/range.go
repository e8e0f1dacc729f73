package valuetxn

import (
	"bytes"
	"context"
	"math"
	"sort"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"google.golang.org/protobuf/proto"
)

// Range serves a range that sorts by values under a rule.
func Range(ctx context.Context, store Store, request *pb.RangeRequest) (*pb.RangeResponse, error) {
	sent, sorts := unsorted(store, request)
	response, err := store.Range(ctx, sent)
	if err != nil {
		return nil, explainTooLong(err)
	}
	if sorts {
		sortByValue(request, response)
	}
	return response, nil
}

// unsorted returns the range that etcd is requested in place of one that it cannot sort, and
// whether the response is to be sorted.
//
// etcd's own way is kept: with an order, and with filters by revision, it sorts everything and cuts
// to the limit afterwards; without either it takes the first keys up to the limit, and one to see
// whether there are more, and sorts these.
func unsorted(s Store, r *pb.RangeRequest) (*pb.RangeRequest, bool) {
	if r.GetSortTarget() != pb.RangeRequest_VALUE || !s.Overlaps(r.GetKey(), r.GetRangeEnd()) {
		return r, false
	}
	sent, _ := proto.Clone(r).(*pb.RangeRequest)
	sent.SortTarget = pb.RangeRequest_KEY
	if _, known := pb.RangeRequest_SortOrder_name[int32(r.GetSortOrder())]; !known {
		return sent, false // etcd refuses it
	}
	sent.SortOrder, sent.KeysOnly = pb.RangeRequest_NONE, false
	switch {
	case r.GetSortOrder() != pb.RangeRequest_NONE || r.GetMinModRevision() != 0 || r.GetMaxModRevision() != 0 || r.GetMinCreateRevision() != 0 || r.GetMaxCreateRevision() != 0:
		sent.Limit = 0
	case r.GetLimit() > 0 && r.GetLimit() < math.MaxInt64:
		sent.Limit = r.GetLimit() + 1
	}
	return sent, true
}

// valueOrder orders as etcd does, which matters where values are equal: the same unstable algorithm
// on the same input.
type valueOrder []*mvccpb.KeyValue

func (s valueOrder) Len() int           { return len(s) }
func (s valueOrder) Swap(i, j int)      { s[i], s[j] = s[j], s[i] }
func (s valueOrder) Less(i, j int) bool { return bytes.Compare(s[i].GetValue(), s[j].GetValue()) < 0 }

// sortByValue makes of an unsorted response the one that was requested.
func sortByValue(request *pb.RangeRequest, response *pb.RangeResponse) {
	if request.GetSortOrder() == pb.RangeRequest_DESCEND {
		sort.Sort(sort.Reverse(valueOrder(response.Kvs)))
	} else {
		sort.Sort(valueOrder(response.Kvs))
	}
	response.More = request.GetLimit() > 0 && int64(len(response.Kvs)) > request.GetLimit()
	if response.More {
		response.Kvs = response.Kvs[:request.GetLimit()]
	}
	if request.GetKeysOnly() {
		for _, kv := range response.Kvs {
			kv.Value = nil
		}
	}
}

// unsortedOps does what unsorted does for every range in the operations of a transaction, in place.
// It reports whether any response is to be sorted.
func unsortedOps(s Store, ops []*pb.RequestOp) (sorts bool) {
	for _, op := range ops {
		switch o := op.GetRequest().(type) {
		case *pb.RequestOp_RequestRange:
			sent, sorted := unsorted(s, o.RequestRange)
			o.RequestRange, sorts = sent, sorts || sorted
		case *pb.RequestOp_RequestTxn:
			if t := o.RequestTxn; t != nil {
				success, failure := unsortedOps(s, t.GetSuccess()), unsortedOps(s, t.GetFailure())
				sorts = sorts || success || failure
			}
		}
	}
	return sorts
}

// sortOps sorts the responses to the operations of a transaction, as they were requested.
func sortOps(s Store, request []*pb.RequestOp, responses []*pb.ResponseOp) {
	for i, op := range request {
		if i >= len(responses) {
			return
		}
		switch o := op.GetRequest().(type) {
		case *pb.RequestOp_RequestRange:
			if response := responses[i].GetResponseRange(); response != nil {
				if _, sorts := unsorted(s, o.RequestRange); sorts {
					sortByValue(o.RequestRange, response)
				}
			}
		case *pb.RequestOp_RequestTxn:
			if response := responses[i].GetResponseTxn(); response != nil {
				sortOps(s, Branch(o.RequestTxn, response.GetSucceeded()), response.GetResponses())
			}
		}
	}
}

// Branch returns the operations of a transaction whose compares succeeded, or did not.
func Branch(t *pb.TxnRequest, succeeded bool) []*pb.RequestOp {
	if succeeded {
		return t.GetSuccess()
	}
	return t.GetFailure()
}
