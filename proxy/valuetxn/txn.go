package valuetxn

import (
	"cmp"
	"context"
	"fmt"
	"hash/maphash"
	"iter"
	"math"
	"math/rand/v2"
	"slices"
	"time"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// A transaction that compares encrypted values is decided here and then proven to etcd. What it
// compares is read at one revision, decrypted and compared; then etcd is sent the chosen branch
// alone, under compares of revisions that hold as long as the decision does (the guards). If they
// do not hold any more, nothing was done, and it starts again.
//
// The other branch goes along where it can never be taken, since etcd checks it, too: keys, limits
// and permissions.
//
// How much is read is bounded: what etcd refuses whatever its keys hold is refused before, and the
// compares of all nested transactions of one depth are read together.

const (
	// maxAttempts bounds how often a transaction is started again.
	maxAttempts = 1000
	// pageKeys is how many keys of a compared range are read at a time, at first.
	pageKeys = 500
	// maxCompares bounds the compares of a transaction that are decided here, over all nested ones,
	// and maxRangeCompares those of ranges, which are read one by one. etcd's own default allows
	// 128 of a list, and what holds goes into one list of guards.
	maxCompares      = 1000
	maxRangeCompares = 128
)

var errManyCompares = rpc.Error(codes.ResourceExhausted, fmt.Sprintf(
	"values under a rule are compared here, and that is done for transactions with at most %d compares, %d of them of ranges: compare fewer", maxCompares, maxRangeCompares))

var errContended = rpc.Error(codes.Aborted, fmt.Sprintf("a compare by value did not come to an end in %d attempts, since others kept writing what it compares", maxAttempts))

// Turns make those who compare the same key wait for each other, so that not all but one of many
// fail over and over. Only who has failed once takes a turn.
type Turns struct {
	seed  maphash.Seed
	slots [256]chan struct{}
}

// NewTurns makes the turns of a process.
func NewTurns() *Turns {
	t := &Turns{seed: maphash.MakeSeed()}
	for i := range t.slots {
		t.slots[i] = make(chan struct{}, 1)
	}
	return t
}

// take waits for the key's turn; done gives it back.
func (t *Turns) take(ctx context.Context, key []byte) (done func(), err error) {
	slot := t.slots[maphash.Bytes(t.seed, key)%uint64(len(t.slots))]
	select {
	case slot <- struct{}{}:
		return func() { <-slot }, nil
	case <-ctx.Done():
		return nil, status.FromContextError(ctx.Err()).Err()
	}
}

// Txn serves a transaction that compares or sorts by values under a rule. It may change request.
func Txn(ctx context.Context, s Store, turns *Turns, request *pb.TxnRequest) (*pb.TxnResponse, error) {
	return (&txn{store: s, turns: turns, request: request}).serve(ctx)
}

// serve returns the response to the transaction.
func (t *txn) serve(ctx context.Context) (*pb.TxnResponse, error) {
	strip(t.request)
	if !t.byValue(t.request) {
		return t.send(ctx, t.request, false)
	}
	if err := t.check(ctx); err != nil {
		return nil, err
	}
	t.serializable = serializable(t.request)
	for attempt := range maxAttempts {
		response, err := t.attempt(ctx)
		if status.Code(err) == codes.InvalidArgument {
			err = t.explain(ctx, err)
		}
		if response != nil || err != nil {
			return response, err
		}
		if attempt == 0 {
			done, err := t.turns.take(ctx, t.compared)
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

// txn is the work on one transaction.
type txn struct {
	store    Store
	turns    *Turns
	request  *pb.TxnRequest
	compared []byte // a key that is compared by value
	separate bool   // the other branch is checked by a transaction of its own
	// serializable says that a member answers from what it has, without a leader: so must
	// everything that is asked on the way.
	serializable bool
}

// serializable reports whether etcd takes a transaction for one: both branches are serializable
// ranges alone, and there may be none.
func serializable(request *pb.TxnRequest) bool {
	other := func(op *pb.RequestOp) bool { return !op.GetRequestRange().GetSerializable() }
	return !slices.ContainsFunc(request.GetSuccess(), other) && !slices.ContainsFunc(request.GetFailure(), other)
}

// check refuses, before anything is read for it, what etcd refuses whatever its keys hold, and what
// is too much. Where something looks wrong, etcd says what it is, and whether it is.
func (t *txn) check(ctx context.Context) error {
	if checkTxn(t.request, maxTxnOps) != nil {
		if err := t.explain(ctx, nil); err != nil {
			return err
		}
	}
	if all, ranges := t.compares(); all > maxCompares || ranges > maxRangeCompares {
		return errManyCompares
	}
	return nil
}

// withNested yields a transaction and all that are nested in it, in either branch.
func withNested(request *pb.TxnRequest) iter.Seq[*pb.TxnRequest] {
	return func(yield func(*pb.TxnRequest) bool) { yieldNested(request, yield) }
}

func yieldNested(request *pb.TxnRequest, yield func(*pb.TxnRequest) bool) bool {
	if !yield(request) {
		return false
	}
	for _, ops := range [][]*pb.RequestOp{request.GetSuccess(), request.GetFailure()} {
		for _, op := range ops {
			if nested := op.GetRequestTxn(); nested != nil && !yieldNested(nested, yield) {
				return false
			}
		}
	}
	return true
}

// compares counts the compares that may have to be read.
func (t *txn) compares() (all, ranges int) {
	for request := range withNested(t.request) {
		if !t.byValue(request) {
			continue
		}
		all += len(request.GetCompare())
		for _, c := range request.GetCompare() {
			if len(c.GetRangeEnd()) > 0 {
				ranges++
			}
		}
	}
	return all, ranges
}

// covered reports whether c compares by encrypted values.
func (t *txn) covered(c *pb.Compare) bool {
	return c.GetTarget() == pb.Compare_VALUE && (t.store.Overlaps(c.GetKey(), c.GetRangeEnd()) || t.store.Overlaps(c.GetKey(), nil))
}

// strip takes away operands that etcd would ignore, and write to its log: a value where something
// else is compared.
func strip(all *pb.TxnRequest) {
	for request := range withNested(all) {
		for _, c := range request.GetCompare() {
			if _, isValue := c.GetTargetUnion().(*pb.Compare_Value); isValue && c.GetTarget() != pb.Compare_VALUE {
				c.TargetUnion = nil
			}
		}
	}
}

// byValue reports whether a transaction or one within it compares by encrypted values.
func (t *txn) byValue(all *pb.TxnRequest) bool {
	for request := range withNested(all) {
		for _, c := range request.GetCompare() {
			if t.covered(c) {
				t.compared = c.GetKey()
				return true
			}
		}
	}
	return false
}

// attempt returns nil and no error if what it had read was written meanwhile.
func (t *txn) attempt(ctx context.Context) (*pb.TxnResponse, error) {
	d := &decision{txn: t, batch: maxTxnOps, seen: make(map[*pb.Compare]outcome), holds: make(map[*pb.TxnRequest]bool), guarded: make(map[string]struct{})}
	if err := d.decideAll(ctx); err != nil {
		return d.restart(err)
	}
	holds := d.holds[t.request]
	chosen, other := Branch(t.request, holds), Branch(t.request, !holds)
	sent := &pb.TxnRequest{Success: d.settle(chosen), Compare: d.guards}
	if slices.ContainsFunc(chosen, func(op *pb.RequestOp) bool { return op.GetRequestTxn() != nil }) {
		sent.Compare = t.pad(sent.Compare, len(other), true)
	}
	if len(other) > 0 {
		check := t.checkOnly(t.pad(nil, 1, false), other)
		switch {
		case t.serializable:
			// a nested transaction is not; these may be taken, and their responses are thrown away
			for _, op := range check.GetSuccess() {
				op.GetRequestRange().Revision, op.GetRequestRange().CountOnly = 0, true
			}
			sent.Failure = check.GetSuccess()
		case !t.separate:
			sent.Failure = []*pb.RequestOp{{Request: &pb.RequestOp_RequestTxn{RequestTxn: check}}}
		default:
			check.Compare = t.pad(check.Compare, max(len(t.request.GetCompare()), len(chosen)), false)
			if _, err := t.store.Txn(ctx, check, MaxResponseBytes); err != nil {
				return nil, explainTooLong(err)
			}
		}
	}
	response, err := t.send(ctx, sent, !holds)
	if err != nil && len(sent.GetFailure()) > 0 && !t.serializable && isTooManyOps(err) {
		// The nesting is what made it too much, perhaps.
		t.separate = true
		return nil, nil
	}
	return response, err
}

// explain returns the error that etcd has for the transaction as it was requested, where it refused
// one that was made of it: of several things that are wrong the one that etcd meets first. It looks
// at the operations of both branches before it looks for keys that are written twice in either.
func (t *txn) explain(ctx context.Context, err error) error {
	var twice error
	for i, ops := range [][]*pb.RequestOp{t.request.GetSuccess(), t.request.GetFailure()} {
		if i > 0 && len(ops) == 0 {
			break
		}
		var compares []*pb.Compare
		for _, c := range t.request.GetCompare() {
			compares = append(compares, constant(c, false))
		}
		check := t.checkOnly(t.pad(compares, max(len(t.request.GetSuccess()), len(t.request.GetFailure())), false), ops)
		switch _, own := t.store.Txn(ctx, check, MaxResponseBytes); {
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

// checkOnly is a transaction that does nothing and has etcd check ops; its compares do not hold.
func (t *txn) checkOnly(compares []*pb.Compare, ops []*pb.RequestOp) *pb.TxnRequest {
	check, _ := proto.Clone(&pb.TxnRequest{Compare: compares, Success: ops}).(*pb.TxnRequest)
	t.neutralize(check)
	unsortedOps(t.store, check.GetSuccess())
	return check
}

// pad adds compares that hold, or do not, until there are n. The more a transaction has of
// anything, the less etcd lets those within it have: where a part of it is sent alone, that
// must not become more.
func (t *txn) pad(compares []*pb.Compare, n int, holds bool) []*pb.Compare {
	for len(compares) < n {
		compares = append(compares, constant(&pb.Compare{Key: []byte(cmp.Or(string(t.compared), "/"))}, holds))
	}
	return compares
}

// neutralize puts constants in the place of all covered compares of a transaction that is never
// taken.
func (t *txn) neutralize(all *pb.TxnRequest) {
	for request := range withNested(all) {
		for i, c := range request.GetCompare() {
			if t.covered(c) {
				request.Compare[i] = constant(c, false)
			}
		}
	}
}

// send sends a transaction under guards, and returns the response as the client is to see it: nil
// if the guards did not hold. failed says that the branch is the one that was requested in case of
// failure. A transaction of the client's own, which only sorts by value, has no guards.
func (t *txn) send(ctx context.Context, sent *pb.TxnRequest, failed bool) (*pb.TxnResponse, error) {
	guarded := sent != t.request
	if !guarded {
		sent, _ = proto.Clone(sent).(*pb.TxnRequest)
	}
	sorts := unsortedOps(t.store, sent.GetSuccess())
	sorts = unsortedOps(t.store, sent.GetFailure()) || sorts
	limit := MaxResponseBytes
	if !guarded && !sorts {
		limit = math.MaxInt32
	}
	out, err := t.store.Txn(ctx, sent, limit)
	if err != nil {
		return nil, explainTooLong(err)
	}
	if guarded && !out.GetSucceeded() {
		return nil, nil
	}
	if guarded {
		out.Succeeded = !failed
	}
	if sorts {
		sortOps(t.store, Branch(t.request, out.GetSucceeded()), out.GetResponses())
	}
	return out, nil
}
