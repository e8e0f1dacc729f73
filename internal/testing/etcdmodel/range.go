package etcdmodel

import (
	"bytes"
	"cmp"
	"math"
	"slices"
	"sort"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
)

func checkRange(r *pb.RangeRequest) error {
	if len(r.GetKey()) == 0 {
		return rpctypes.ErrGRPCEmptyKey
	}
	_, order := pb.RangeRequest_SortOrder_name[int32(r.GetSortOrder())]
	_, target := pb.RangeRequest_SortTarget_name[int32(r.GetSortTarget())]
	if !order || !target {
		return rpctypes.ErrGRPCInvalidSortOption
	}
	return nil
}

// checkRangeNow is about the revision.
func (w *writing) checkRangeNow(r *pb.RangeRequest) error {
	switch {
	case r.GetRevision() > w.now():
		return rpctypes.ErrGRPCFutureRev
	case r.GetRevision() != 0 && r.GetRevision() < w.compacted:
		return rpctypes.ErrGRPCCompacted
	}
	return nil
}

func (w *writing) rangeOnce(r *pb.RangeRequest) (*pb.RangeResponse, error) {
	if err := checkRange(r); err != nil {
		return nil, err
	}
	if err := w.checkRangeNow(r); err != nil {
		return nil, err
	}
	return w.ranged(r), nil
}

// ranged reads, filters, sorts and cuts, in this order; but where nothing is filtered and no order
// is asked for, it reads no more keys than it takes, and sorts those.
func (w *writing) ranged(r *pb.RangeRequest) *pb.RangeResponse {
	rev := r.GetRevision()
	if rev <= 0 {
		rev = w.now()
	}
	found := w.find(r.GetKey(), r.GetRangeEnd(), rev)
	answer := &pb.RangeResponse{Header: w.header(), Count: int64(len(found))}
	if r.GetCountOnly() {
		return answer
	}
	byKey := r.GetSortTarget() == pb.RangeRequest_KEY
	filters := r.GetMinModRevision() != 0 || r.GetMaxModRevision() != 0 || r.GetMinCreateRevision() != 0 || r.GetMaxCreateRevision() != 0
	natural := r.GetSortOrder() == pb.RangeRequest_NONE || byKey && r.GetSortOrder() == pb.RangeRequest_ASCEND
	if limit := r.GetLimit(); natural && !filters && limit > 0 && limit < math.MaxInt64 {
		found = found[:min(int64(len(found)), limit+1)]
	}
	found = slices.DeleteFunc(found, func(kv *mvccpb.KeyValue) bool {
		out := func(rev, least, most int64) bool { return least != 0 && rev < least || most != 0 && rev > most }
		return out(kv.GetModRevision(), r.GetMinModRevision(), r.GetMaxModRevision()) || out(kv.GetCreateRevision(), r.GetMinCreateRevision(), r.GetMaxCreateRevision())
	})
	if r.GetSortOrder() == pb.RangeRequest_DESCEND {
		sort.Sort(sort.Reverse(&pairs{found, r.GetSortTarget()}))
	} else if !byKey {
		sort.Sort(&pairs{found, r.GetSortTarget()})
	}
	if limit := r.GetLimit(); limit > 0 && int64(len(found)) > limit {
		found, answer.More = found[:limit], true
	}
	if r.GetKeysOnly() {
		for _, kv := range found {
			kv.Value = nil
			if r.GetSortTarget() != pb.RangeRequest_VALUE {
				kv.Lease = 0 // since 3.7: it is not in the index
			}
		}
	}
	answer.Kvs = found
	return answer
}

// pairs are sorted by etcd's own unstable algorithm.
type pairs struct {
	kvs []*mvccpb.KeyValue
	by  pb.RangeRequest_SortTarget
}

func (p *pairs) Len() int { return len(p.kvs) }

func (p *pairs) Swap(i, j int) { p.kvs[i], p.kvs[j] = p.kvs[j], p.kvs[i] }

func (p *pairs) Less(i, j int) bool {
	a, b := p.kvs[i], p.kvs[j]
	switch p.by {
	case pb.RangeRequest_VERSION:
		return a.GetVersion() < b.GetVersion()
	case pb.RangeRequest_CREATE:
		return a.GetCreateRevision() < b.GetCreateRevision()
	case pb.RangeRequest_MOD:
		return a.GetModRevision() < b.GetModRevision()
	case pb.RangeRequest_VALUE:
		return bytes.Compare(a.GetValue(), b.GetValue()) < 0
	}
	return bytes.Compare(a.GetKey(), b.GetKey()) < 0
}

// compare wants every key of a range to hold. Where there is none it compares with nothing, and of
// a value says no.
func (w *writing) compare(c *pb.Compare) bool {
	found := w.find(c.GetKey(), c.GetRangeEnd(), w.now())
	if len(found) == 0 {
		return c.GetTarget() != pb.Compare_VALUE && compareOne(c, &mvccpb.KeyValue{})
	}
	return !slices.ContainsFunc(found, func(kv *mvccpb.KeyValue) bool { return !compareOne(c, kv) })
}

// compareOne takes an operand of another kind than the target for none.
func compareOne(c *pb.Compare, kv *mvccpb.KeyValue) bool {
	var order int
	switch c.GetTarget() {
	case pb.Compare_VERSION:
		order = cmp.Compare(kv.GetVersion(), c.GetVersion())
	case pb.Compare_CREATE:
		order = cmp.Compare(kv.GetCreateRevision(), c.GetCreateRevision())
	case pb.Compare_MOD:
		order = cmp.Compare(kv.GetModRevision(), c.GetModRevision())
	case pb.Compare_VALUE:
		order = bytes.Compare(kv.GetValue(), c.GetValue())
	case pb.Compare_LEASE:
		order = cmp.Compare(kv.GetLease(), c.GetLease())
	}
	switch c.GetResult() {
	case pb.Compare_EQUAL:
		return order == 0
	case pb.Compare_GREATER:
		return order > 0
	case pb.Compare_LESS:
		return order < 0
	case pb.Compare_NOT_EQUAL:
		return order != 0
	}
	return true // a result that etcd does not know
}
