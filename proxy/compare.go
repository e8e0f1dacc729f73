package proxy

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"math/rand/v2"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"
)

// A transaction that compares sealed values is decided here and then proven to etcd. What it compares is read at one revision, opened, and compared; then etcd is sent the chosen
// branch alone, under compares of revisions that hold as long as the decision does (the guards). If they do not hold any more, nothing was done, and it begins anew.
//
// The other branch goes along where it can never be taken, since etcd checks it, too: keys, limits and permissions.

const (
	// maxAttempts bounds how often a transaction is begun anew.
	maxAttempts = 1000
	// pageKeys is how many keys of a compared range are read at a time, at first.
	pageKeys = 500
)

var errContended = ownError(codes.Aborted, fmt.Sprintf("a compare by value did not come to an end in %d attempts, since others kept writing what it compares", maxAttempts))

// turns make those who compare the same key wait for each other, so that not all but one of many fail over and over. Only who has failed once takes a turn.
type turns struct {
	seed  maphash.Seed
	slots [256]chan struct{}
}

func newTurns() *turns {
	t := &turns{seed: maphash.MakeSeed()}
	for i := range t.slots {
		t.slots[i] = make(chan struct{}, 1)
	}
	return t
}

// take waits for the key's turn; done gives it back.
func (t *turns) take(ctx context.Context, key []byte) (done func(), err error) {
	slot := t.slots[maphash.Bytes(t.seed, key)%uint64(len(t.slots))]
	select {
	case slot <- struct{}{}:
		return func() { <-slot }, nil
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// exchange serves a transaction that compares or sorts by value.
func (c *txnCall) exchange(ctx context.Context, msg []byte, ask asker) ([]byte, error) {
	t := &valueTxn{txnCall: c, ask: ask, asked: new(pb.TxnRequest)}
	if err := decode(msg, t.asked); err != nil {
		return nil, c.core.status(err, false)
	}
	t.strip(t.asked)
	if !t.byValue(t.asked) {
		return t.send(ctx, t.asked, false)
	}
	t.serializable = serializable(t.asked)
	for attempt := range maxAttempts {
		answer, err := t.attempt(ctx)
		if status.Code(err) == codes.InvalidArgument {
			err = t.explain(ctx, err)
		}
		if answer != nil || err != nil {
			return answer, err
		}
		if attempt == 0 {
			done, err := c.core.turns.take(ctx, t.compared)
			if err != nil {
				return nil, err
			}
			defer done()
			continue
		}
		// Others may come through other proxies.
		select {
		case <-time.After(rand.N(min(time.Duration(attempt)*time.Millisecond, 20*time.Millisecond) + 1)): //nolint:gosec // no secret
		case <-ctx.Done():
			return nil, status.FromContextError(ctx.Err()).Err()
		}
	}
	return nil, errContended
}

// valueTxn is the work on one transaction.
type valueTxn struct {
	*txnCall
	ask      asker
	asked    *pb.TxnRequest
	compared []byte // a key that is compared by value
	apart    bool   // the other branch is checked by a transaction of its own
	// serializable says that a member answers from what it has, without a leader: so must everything that is asked on the way.
	serializable bool
}

// serializable reports whether etcd takes a transaction for one: both branches are serializable ranges alone, and there may be none.
func serializable(txn *pb.TxnRequest) bool {
	other := func(op *pb.RequestOp) bool { return !op.GetRequestRange().GetSerializable() }
	return !slices.ContainsFunc(txn.GetSuccess(), other) && !slices.ContainsFunc(txn.GetFailure(), other)
}

// covered reports whether c compares by values that are sealed.
func (t *valueTxn) covered(c *pb.Compare) bool {
	return c.GetTarget() == pb.Compare_VALUE && (t.at.Overlaps(c.GetKey(), c.GetRangeEnd()) || t.at.Overlaps(c.GetKey(), nil))
}

// strip takes away operands that etcd would ignore, and write to its log: a value where something else is compared.
func (t *valueTxn) strip(txn *pb.TxnRequest) {
	for _, c := range txn.GetCompare() {
		if _, isValue := c.GetTargetUnion().(*pb.Compare_Value); isValue && c.GetTarget() != pb.Compare_VALUE {
			c.TargetUnion = nil
		}
	}
	for _, ops := range [][]*pb.RequestOp{txn.GetSuccess(), txn.GetFailure()} {
		for _, op := range ops {
			if nested := op.GetRequestTxn(); nested != nil {
				t.strip(nested)
			}
		}
	}
}

// byValue reports whether txn or one within it compares by values that are sealed.
func (t *valueTxn) byValue(txn *pb.TxnRequest) bool {
	for _, c := range txn.GetCompare() {
		if t.covered(c) {
			t.compared = c.GetKey()
			return true
		}
	}
	for _, ops := range [][]*pb.RequestOp{txn.GetSuccess(), txn.GetFailure()} {
		for _, op := range ops {
			if nested := op.GetRequestTxn(); nested != nil && t.byValue(nested) {
				return true
			}
		}
	}
	return false
}

// attempt returns nil and no error if what it had read was written meanwhile.
func (t *valueTxn) attempt(ctx context.Context) ([]byte, error) {
	d := &decision{valueTxn: t}
	holds, err := d.decide(ctx, t.asked.GetCompare(), true)
	if err != nil {
		return d.again(err)
	}
	chosen, other := branchOf(t.asked, holds), branchOf(t.asked, !holds)
	sent := &pb.TxnRequest{}
	if sent.Success, err = d.settle(ctx, chosen); err != nil {
		return d.again(err)
	}
	sent.Compare = d.guards
	if slices.ContainsFunc(chosen, func(op *pb.RequestOp) bool { return op.GetRequestTxn() != nil }) {
		sent.Compare = t.padded(sent.Compare, len(other), true)
	}
	if len(other) > 0 {
		check := t.never(t.padded(nil, 1, false), other)
		switch {
		case t.serializable: // a nested transaction is not; these may be taken, and their answers are thrown away
			for _, op := range check.GetSuccess() {
				op.GetRequestRange().Revision, op.GetRequestRange().CountOnly = 0, true
			}
			sent.Failure = check.GetSuccess()
		case !t.apart:
			sent.Failure = []*pb.RequestOp{{Request: &pb.RequestOp_RequestTxn{RequestTxn: check}}}
		default:
			check.Compare = t.padded(check.Compare, max(len(t.asked.GetCompare()), len(chosen)), false)
			if _, err := t.askTxn(ctx, check, t.ask); err != nil {
				return nil, tooMuch(err)
			}
		}
	}
	answer, err := t.send(ctx, sent, !holds)
	if err != nil && len(sent.GetFailure()) > 0 && !t.serializable && isTooManyOps(err) {
		// The nesting is what made it too much, perhaps.
		t.apart = true
		return nil, nil
	}
	return answer, err
}

// explain returns the error that etcd has for the transaction as it was asked for, where it refused one that was made of it: of several things that are wrong
// the one that etcd meets first. It looks at the operations of both branches before it looks for keys that are written twice in either.
func (t *valueTxn) explain(ctx context.Context, err error) error {
	var twice error
	for i, ops := range [][]*pb.RequestOp{t.asked.GetSuccess(), t.asked.GetFailure()} {
		if i > 0 && len(ops) == 0 {
			break
		}
		var compares []*pb.Compare
		for _, c := range t.asked.GetCompare() {
			compares = append(compares, constant(c, false))
		}
		check := t.never(t.padded(compares, max(len(t.asked.GetSuccess()), len(t.asked.GetFailure())), false), ops)
		switch _, own := t.askTxn(ctx, check, t.ask); {
		case status.Code(own) != codes.InvalidArgument:
		case status.Convert(own).Message() != rpctypes.ErrorDesc(rpctypes.ErrGRPCDuplicateKey):
			return own
		case twice == nil:
			twice = own
		}
	}
	if twice != nil {
		return twice
	}
	return err
}

func isTooManyOps(err error) bool {
	return status.Convert(err).Message() == rpctypes.ErrorDesc(rpctypes.ErrGRPCTooManyOps)
}

// never is a transaction that does nothing and has etcd check ops; its compares do not hold.
func (t *valueTxn) never(compares []*pb.Compare, ops []*pb.RequestOp) *pb.TxnRequest {
	check, _ := proto.Clone(&pb.TxnRequest{Compare: compares, Success: ops}).(*pb.TxnRequest)
	t.blind(check)
	t.at.unsortedOps(check.GetSuccess())
	return check
}

// padded adds compares that hold, or do not, until there are n. The more a transaction has of anything, the less etcd lets those within it have: where a part of it is sent by
// itself, that must not become more.
func (t *valueTxn) padded(compares []*pb.Compare, n int, holds bool) []*pb.Compare {
	for len(compares) < n {
		compares = append(compares, constant(&pb.Compare{Key: []byte(cmp.Or(string(t.compared), "/"))}, holds))
	}
	return compares
}

// blind puts constants in the place of all covered compares of a transaction that is never taken.
func (t *valueTxn) blind(txn *pb.TxnRequest) {
	for i, c := range txn.GetCompare() {
		if t.covered(c) {
			txn.Compare[i] = constant(c, false)
		}
	}
	for _, ops := range [][]*pb.RequestOp{txn.GetSuccess(), txn.GetFailure()} {
		for _, op := range ops {
			if nested := op.GetRequestTxn(); nested != nil {
				t.blind(nested)
			}
		}
	}
}

// send sends a transaction under guards, and returns the answer as the client is to see it: nil if the guards did not hold. failed says that the branch is the one that was
// asked for in case of failure. A transaction of the client's own, which only sorts by value, has no guards.
func (t *valueTxn) send(ctx context.Context, sent *pb.TxnRequest, failed bool) ([]byte, error) {
	guarded := sent != t.asked
	if !guarded {
		sent, _ = proto.Clone(sent).(*pb.TxnRequest)
	}
	sorts := t.at.unsortedOps(sent.GetSuccess())
	sorts = t.at.unsortedOps(sent.GetFailure()) || sorts
	answer, err := t.askTxn(ctx, sent, t.ask)
	if err != nil {
		return nil, tooMuch(err)
	}
	out := new(pb.TxnResponse)
	if err := decode(answer, out); err != nil {
		return nil, t.core.status(err, true)
	}
	if guarded && !out.GetSucceeded() {
		return nil, nil
	}
	if guarded {
		out.Succeeded = !failed
	}
	if sorts {
		t.at.sortOps(branchOf(t.asked, out.GetSucceeded()), out.GetResponses())
	}
	answer, err = encode(out)
	return answer, t.core.status(err, true)
}

// decision gathers what a transaction was decided on.
type decision struct {
	*valueTxn
	revision int64 // of all that was read; 0: nothing yet
	guards   []*pb.Compare
}

// again makes a new attempt of a revision that was compacted under way, or that the next member does not have yet.
func (d *decision) again(err error) ([]byte, error) {
	if d.revision > 0 {
		switch status.Convert(err).Message() {
		case rpctypes.ErrorDesc(rpctypes.ErrGRPCCompacted), rpctypes.ErrorDesc(rpctypes.ErrGRPCFutureRev):
			return nil, nil
		}
	}
	return nil, err
}

// settle returns ops with every nested transaction that compares by value decided: its compares are constants. Nested transactions that do not are etcd's to decide, at the same moment.
func (d *decision) settle(ctx context.Context, ops []*pb.RequestOp) ([]*pb.RequestOp, error) {
	settled := make([]*pb.RequestOp, len(ops))
	for i, op := range ops {
		nested := op.GetRequestTxn()
		if nested == nil || !d.byValue(nested) {
			settled[i], _ = proto.Clone(op).(*pb.RequestOp) // its sorts are changed in place
			continue
		}
		holds, err := d.decide(ctx, nested.GetCompare(), false)
		if err != nil {
			return nil, err
		}
		txn := new(pb.TxnRequest)
		for _, c := range nested.GetCompare() {
			txn.Compare = append(txn.Compare, constant(c, holds))
		}
		taken, err := d.settle(ctx, branchOf(nested, holds))
		if err != nil {
			return nil, err
		}
		untaken := new(pb.TxnRequest)
		proto.Merge(untaken, &pb.TxnRequest{Success: branchOf(nested, !holds)})
		d.blind(untaken)
		if txn.Success, txn.Failure = taken, untaken.GetSuccess(); !holds {
			txn.Success, txn.Failure = txn.Failure, txn.Success
		}
		settled[i] = &pb.RequestOp{Request: &pb.RequestOp_RequestTxn{RequestTxn: txn}}
	}
	return settled, nil
}

// decide says whether all compares hold, and adds the guards for it. With fill these are as many as there are compares, and one more for each range that holds, so that etcd finds
// as much as it would have to limit and to permit; without it, no more than it takes.
func (d *decision) decide(ctx context.Context, compares []*pb.Compare, fill bool) (bool, error) {
	seen, err := d.look(ctx, compares)
	if err != nil {
		return false, err
	}
	no := slices.IndexFunc(seen, func(s seenCompare) bool { return !s.holds })
	for i, c := range compares {
		switch {
		case no == i:
			d.guard(fill, seen[i].guard)
		case no >= 0 && fill:
			d.guard(fill, constant(c, true))
		case no >= 0:
		case !d.covered(c):
			d.guard(fill, c) // etcd says whether it still holds
		case len(c.GetRangeEnd()) == 0:
			d.guard(fill, seen[i].guard)
		default: // no key of the range was written since, and there is one
			d.guard(fill,
				&pb.Compare{Result: pb.Compare_LESS, Target: pb.Compare_MOD, Key: c.GetKey(), RangeEnd: c.GetRangeEnd(), TargetUnion: &pb.Compare_ModRevision{ModRevision: d.revision + 1}},
				&pb.Compare{Result: pb.Compare_GREATER, Target: pb.Compare_VERSION, Key: c.GetKey(), RangeEnd: c.GetRangeEnd(), TargetUnion: &pb.Compare_Version{}})
		}
	}
	return no < 0, nil
}

// guard adds guards; unless they are to fill, none twice.
func (d *decision) guard(fill bool, guards ...*pb.Compare) {
	for _, g := range guards {
		if fill || !slices.ContainsFunc(d.guards, func(have *pb.Compare) bool { return proto.Equal(have, g) }) {
			d.guards = append(d.guards, g)
		}
	}
}

// seenCompare is what a compare met.
type seenCompare struct {
	holds bool
	guard *pb.Compare // holds as long as the key that decided is as it was; nil for a range that holds
}

// look reads what compares are about, all at one revision.
func (d *decision) look(ctx context.Context, compares []*pb.Compare) ([]seenCompare, error) {
	result := make([]seenCompare, len(compares))
	reads, of := new(pb.TxnRequest), []int(nil)
	for i, c := range compares {
		if len(c.GetRangeEnd()) == 0 {
			reads.Success = append(reads.Success, &pb.RequestOp{Request: &pb.RequestOp_RequestRange{RequestRange: d.read(c)}})
			of = append(of, i)
		}
	}
	if len(of) > 0 {
		msg, err := d.askTxn(ctx, reads, d.ask)
		if err != nil {
			return nil, tooMuch(err)
		}
		answer := new(pb.TxnResponse)
		if err := decode(msg, answer); err != nil {
			return nil, d.core.status(err, true)
		}
		if len(answer.GetResponses()) != len(of) {
			return nil, d.core.status(errors.New("etcd answered another number of reads"), true)
		}
		d.revision = cmp.Or(d.revision, answer.GetHeader().GetRevision())
		for n, i := range of {
			result[i] = d.met(compares[i], answer.GetResponses()[n].GetResponseRange().GetKvs())
		}
	}
	for i, c := range compares {
		if len(c.GetRangeEnd()) > 0 {
			var err error
			if result[i], err = d.meet(ctx, c); err != nil {
				return nil, err
			}
		}
	}
	return result, nil
}

// read is the range that a compare looks at. etcd 3.7 leaves out the lease, too, where only keys are asked for.
func (d *decision) read(c *pb.Compare) *pb.RangeRequest {
	keysOnly := c.GetTarget() != pb.Compare_VALUE && c.GetTarget() != pb.Compare_LEASE
	return &pb.RangeRequest{Key: c.GetKey(), RangeEnd: c.GetRangeEnd(), Revision: d.revision, KeysOnly: keysOnly, Serializable: d.serializable}
}

// meet reads the range of a compare page by page, up to the first key that it does not hold for.
func (d *decision) meet(ctx context.Context, c *pb.Compare) (seenCompare, error) {
	r := d.read(c)
	for r.Limit = pageKeys; ; {
		r.Revision = d.revision
		page, err := d.askRange(ctx, r, d.ask)
		if overlong(err) && r.GetLimit() > 1 {
			r.Limit = max(1, r.GetLimit()/8)
			continue
		}
		if err != nil {
			return seenCompare{}, tooMuch(err)
		}
		d.revision = cmp.Or(d.revision, page.GetHeader().GetRevision())
		for _, kv := range page.GetKvs() {
			if !holds(c, kv) {
				return seenCompare{guard: unchanged(kv.GetKey(), kv.GetModRevision())}, nil
			}
		}
		if !page.GetMore() || len(page.GetKvs()) == 0 {
			if len(page.GetKvs()) == 0 && bytes.Equal(r.GetKey(), c.GetKey()) {
				return d.met(c, nil), nil
			}
			return seenCompare{holds: true}, nil
		}
		r.Key = append(bytes.Clone(page.GetKvs()[len(page.GetKvs())-1].GetKey()), 0)
	}
}
