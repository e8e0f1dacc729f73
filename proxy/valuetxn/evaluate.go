package valuetxn

import (
	"bytes"
	"cmp"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/mvccpb"
)

// evaluate judges a compare of one key, or of a range without keys.
func (d *decision) evaluate(c *pb.Compare, kvs []*mvccpb.KeyValue) outcome {
	if len(kvs) > 0 {
		return outcome{holds(c, kvs[0]), unchanged(c.GetKey(), kvs[0].GetModRevision())}
	}
	none := &pb.Compare{Result: pb.Compare_EQUAL, Target: pb.Compare_CREATE, Key: c.GetKey(), RangeEnd: c.GetRangeEnd(), TargetUnion: &pb.Compare_CreateRevision{}}
	// Of a value that is not there etcd says that it compares with nothing, not even as unequal.
	return outcome{c.GetTarget() != pb.Compare_VALUE && holds(c, &mvccpb.KeyValue{}), none}
}

// unchanged holds as long as key has not been written or deleted since a revision.
func unchanged(key []byte, modRevision int64) *pb.Compare {
	return &pb.Compare{Result: pb.Compare_EQUAL, Target: pb.Compare_MOD, Key: key, TargetUnion: &pb.Compare_ModRevision{ModRevision: modRevision}}
}

// constant is a compare of the same keys that always holds, or never: versions are not negative.
func constant(c *pb.Compare, holds bool) *pb.Compare {
	k := &pb.Compare{Target: pb.Compare_VERSION, Key: c.GetKey(), RangeEnd: c.GetRangeEnd()}
	if holds {
		k.Result, k.TargetUnion = pb.Compare_GREATER, &pb.Compare_Version{Version: -1}
	} else {
		k.Result, k.TargetUnion = pb.Compare_LESS, &pb.Compare_Version{}
	}
	return k
}

// holds compares as etcd does: an operand of another kind than the target counts as none, a target
// that it does not know as equal, and a result that it does not know as true.
func holds(c *pb.Compare, kv *mvccpb.KeyValue) bool {
	order := 0
	switch c.GetTarget() {
	case pb.Compare_VALUE:
		order = bytes.Compare(kv.GetValue(), c.GetValue())
	case pb.Compare_CREATE:
		order = cmp.Compare(kv.GetCreateRevision(), c.GetCreateRevision())
	case pb.Compare_MOD:
		order = cmp.Compare(kv.GetModRevision(), c.GetModRevision())
	case pb.Compare_VERSION:
		order = cmp.Compare(kv.GetVersion(), c.GetVersion())
	case pb.Compare_LEASE:
		order = cmp.Compare(kv.GetLease(), c.GetLease())
	}
	switch c.GetResult() {
	case pb.Compare_EQUAL:
		return order == 0
	case pb.Compare_NOT_EQUAL:
		return order != 0
	case pb.Compare_GREATER:
		return order > 0
	case pb.Compare_LESS:
		return order < 0
	}
	return true
}
