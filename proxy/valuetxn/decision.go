package valuetxn

import (
	"bytes"
	"cmp"
	"context"
	"slices"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// decision gathers what a transaction was decided on.
type decision struct {
	*txn
	revision int64 // of all that was read; 0: nothing yet
	batch    int   // how many reads etcd is requested at once
	seen     map[*pb.Compare]outcome
	holds    map[*pb.TxnRequest]bool // the transactions that were decided here
	guards   []*pb.Compare
	guarded  map[string]struct{} // the guards, encoded
}

// restart makes a new attempt of a revision that was compacted during the attempt, or that the next
// member does not have yet.
func (d *decision) restart(err error) (*pb.TxnResponse, error) {
	if d.revision > 0 {
		switch status.Convert(err).Message() {
		case rpctypes.ErrorDesc(rpctypes.ErrGRPCCompacted), rpctypes.ErrorDesc(rpctypes.ErrGRPCFutureRev):
			return nil, nil
		}
	}
	return nil, err
}

// decideAll decides the transaction and, depth by depth, those nested ones that compare by value
// and that the decisions so far lead to. Nested transactions that do not compare by value are
// etcd's to decide, at the same moment. What all of one depth compare is read together.
func (d *decision) decideAll(ctx context.Context) error {
	for level := []*pb.TxnRequest{d.request}; len(level) > 0; {
		var compares []*pb.Compare
		for _, request := range level {
			compares = append(compares, request.GetCompare()...)
		}
		if err := d.readCompared(ctx, compares); err != nil {
			return err
		}
		var next []*pb.TxnRequest
		for _, request := range level {
			holds := d.decide(request.GetCompare(), request == d.request)
			d.holds[request] = holds
			for _, op := range Branch(request, holds) {
				if nested := op.GetRequestTxn(); nested != nil && d.byValue(nested) {
					next = append(next, nested)
				}
			}
		}
		level = next
	}
	return nil
}

// settle returns ops with the compares of every nested transaction that was decided made constants.
func (d *decision) settle(ops []*pb.RequestOp) []*pb.RequestOp {
	settled := make([]*pb.RequestOp, len(ops))
	for i, op := range ops {
		nested := op.GetRequestTxn()
		holds, decided := d.holds[nested]
		if nested == nil || !decided {
			settled[i], _ = proto.Clone(op).(*pb.RequestOp) // its sorts are changed in place
			continue
		}
		taken := new(pb.TxnRequest)
		for _, c := range nested.GetCompare() {
			taken.Compare = append(taken.Compare, constant(c, holds))
		}
		untaken := new(pb.TxnRequest)
		proto.Merge(untaken, &pb.TxnRequest{Success: Branch(nested, !holds)})
		d.neutralize(untaken)
		if taken.Success, taken.Failure = d.settle(Branch(nested, holds)), untaken.GetSuccess(); !holds {
			taken.Success, taken.Failure = taken.Failure, taken.Success
		}
		settled[i] = &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: taken}}
	}
	return settled
}

// decide says whether all compares hold, and adds the guards for it. With fill these are as many as
// there are compares, and one more for each range that holds, so that etcd finds as much as it
// would have to limit and to permit; without it, no more than it takes.
func (d *decision) decide(compares []*pb.Compare, fill bool) bool {
	no := slices.IndexFunc(compares, func(c *pb.Compare) bool { return !d.seen[c].holds })
	for i, c := range compares {
		switch {
		case no == i:
			d.guard(fill, d.seen[c].guard)
		case no >= 0 && fill:
			d.guard(fill, constant(c, true))
		case no >= 0:
		case !d.covered(c):
			d.guard(fill, c) // etcd says whether it still holds
		case len(c.GetRangeEnd()) == 0:
			d.guard(fill, d.seen[c].guard)
		default: // no key of the range was written since, and there is one
			d.guard(fill,
				&pb.Compare{Result: pb.Compare_LESS, Target: pb.Compare_MOD, Key: c.GetKey(), RangeEnd: c.GetRangeEnd(), TargetUnion: &pb.Compare_ModRevision{ModRevision: d.revision + 1}},
				&pb.Compare{Result: pb.Compare_GREATER, Target: pb.Compare_VERSION, Key: c.GetKey(), RangeEnd: c.GetRangeEnd(), TargetUnion: &pb.Compare_Version{}})
		}
	}
	return no < 0
}

// guard adds guards; unless they are to fill, none twice.
func (d *decision) guard(fill bool, guards ...*pb.Compare) {
	for _, g := range guards {
		encoded, err := proto.MarshalOptions{Deterministic: true}.Marshal(g)
		_, have := d.guarded[string(encoded)]
		if !fill && have && err == nil {
			continue
		}
		d.guarded[string(encoded)] = struct{}{}
		d.guards = append(d.guards, g)
	}
}

// outcome is what a compare met.
type outcome struct {
	holds bool
	// holds as long as the key that decided is as it was; nil for a range that holds
	guard *pb.Compare
}

// readCompared reads what compares are about, all at one revision: those of single keys together,
// each key once, and those of ranges one by one.
func (d *decision) readCompared(ctx context.Context, compares []*pb.Compare) error {
	byKey := make(map[string][]*pb.Compare)
	var keys [][]*pb.Compare
	for _, c := range compares {
		if len(c.GetRangeEnd()) == 0 {
			byKey[string(c.GetKey())] = append(byKey[string(c.GetKey())], c)
		}
	}
	for _, c := range compares {
		if all := byKey[string(c.GetKey())]; len(c.GetRangeEnd()) == 0 && all[0] == c {
			keys = append(keys, all)
		}
	}
	for len(keys) > 0 {
		n := min(len(keys), d.batch)
		err := d.readKeys(ctx, keys[:n])
		switch {
		case err == nil:
			keys = keys[n:]
		case n > 1 && (isTooManyOps(err) || isTooLong(err)):
			d.batch = n / 2
		default:
			return explainTooLong(err)
		}
	}
	for _, c := range compares {
		if len(c.GetRangeEnd()) > 0 {
			var err error
			if d.seen[c], err = d.evaluateRange(ctx, c); err != nil {
				return err
			}
		}
	}
	return nil
}

// readKeys reads keys, each with the compares that are about it, in one request.
func (d *decision) readKeys(ctx context.Context, keys [][]*pb.Compare) error {
	reads := new(pb.TxnRequest)
	for _, about := range keys {
		r := d.read(about[0])
		for _, c := range about[1:] {
			r.KeysOnly = r.GetKeysOnly() && d.read(c).GetKeysOnly()
		}
		reads.Success = append(reads.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: r}})
	}
	response, err := d.store.Txn(ctx, reads, MaxResponseBytes)
	if err != nil {
		return err
	}
	if len(response.GetResponses()) != len(keys) {
		return rpc.Error(codes.Internal, "etcd's answer: malformed message: another number of reads")
	}
	d.revision = cmp.Or(d.revision, response.GetHeader().GetRevision())
	for i, about := range keys {
		for _, c := range about {
			d.seen[c] = d.evaluate(c, response.GetResponses()[i].GetResponseRange().GetKvs())
		}
	}
	return nil
}

// read is the range that a compare looks at. etcd 3.7 leaves out the lease, too, where only keys
// are requested.
func (d *decision) read(c *pb.Compare) *pb.RangeRequest {
	keysOnly := c.GetTarget() != pb.Compare_VALUE && c.GetTarget() != pb.Compare_LEASE
	return &pb.RangeRequest{Key: c.GetKey(), RangeEnd: c.GetRangeEnd(), Revision: d.revision, KeysOnly: keysOnly, Serializable: d.serializable}
}

// evaluateRange reads the range of a compare page by page, up to the first key that it does not
// hold for.
func (d *decision) evaluateRange(ctx context.Context, c *pb.Compare) (outcome, error) {
	r := d.read(c)
	for r.Limit = pageKeys; ; {
		r.Revision = d.revision
		page, err := d.store.Range(ctx, r)
		if isTooLong(err) && r.GetLimit() > 1 {
			r.Limit = max(1, r.GetLimit()/8)
			continue
		}
		if err != nil {
			return outcome{}, explainTooLong(err)
		}
		d.revision = cmp.Or(d.revision, page.GetHeader().GetRevision())
		for _, kv := range page.GetKvs() {
			if !holds(c, kv) {
				return outcome{guard: unchanged(kv.GetKey(), kv.GetModRevision())}, nil
			}
		}
		if !page.GetMore() || len(page.GetKvs()) == 0 {
			if len(page.GetKvs()) == 0 && bytes.Equal(r.GetKey(), c.GetKey()) {
				return d.evaluate(c, nil), nil
			}
			return outcome{holds: true}, nil
		}
		r.Key = append(bytes.Clone(page.GetKvs()[len(page.GetKvs())-1].GetKey()), 0)
	}
}
