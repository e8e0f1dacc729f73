package proxy

import (
	"context"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

// Paths of the methods that calls need for others.
const (
	methodRange           = "/etcdserverpb.KV/Range"
	methodTxn             = "/etcdserverpb.KV/Txn"
	methodRangeStream     = "/etcdserverpb.KV/RangeStream"
	methodLeaseRevoke     = "/etcdserverpb.Lease/LeaseRevoke"
	methodLeaseTimeToLive = "/etcdserverpb.Lease/LeaseTimeToLive"
)

// asker sends one request to etcd, with the client's metadata, and returns the answer, which is the caller's. An answer longer than limit is ResourceExhausted.
type asker func(ctx context.Context, method string, msg []byte, limit int) ([]byte, error)

// exchanger is a call that has more to do than to rewrite one request and its answer: if exchanges is true after the request was seen, exchange does it all. msg is the
// client's message, which it does not change; the answer is for the client.
type exchanger interface {
	exchanges() bool
	exchange(ctx context.Context, msg []byte, ask asker) ([]byte, error)
}

// streamExchanger is an exchanger with more than one answer, which it sends.
type streamExchanger interface {
	exchanger
	exchangeStream(ctx context.Context, msg []byte, ask asker, send func([]byte) error) error
}

// requested returns the request that goes to etcd for msg: what c makes of it, or msg itself if c
// exchanges, since exchange encrypts the requests that it makes.
func requested(ctx context.Context, c call, msg []byte) ([]byte, error) {
	out, err := c.request(blocking(ctx), msg)
	if x, ok := c.(exchanger); ok && x.exchanges() {
		out = msg
	}
	return out, err
}

var (
	_ streamExchanger = (*rangeCall)(nil)
	_ exchanger       = (*txnCall)(nil)
	_ exchanger       = (*deleteCall)(nil)
	_ exchanger       = (*revokeCall)(nil)
)

// store is etcd with plaintext values, as one call sees it. Its errors are statuses for the client.
type store struct {
	*kvCall
	ask asker
}

var _ valueStore = store{}

// Overlaps implements valuetxn.Store.
func (s store) Overlaps(key, rangeEnd []byte) bool { return s.at.Overlaps(key, rangeEnd) }

// Range implements valuetxn.Store.
func (s store) Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	msg, err := encode(r)
	if err != nil {
		return nil, s.core.status(err, false)
	}
	shape, _, err := etcdwire.RangeRequest(msg, tryingRules{s.at})
	if err != nil {
		return nil, s.core.status(err, false)
	}
	answer, err := s.ask(ctx, methodRange, msg, maxByValue)
	if err != nil {
		return nil, err
	}
	answer, err = etcdwire.RangeResponse(answer, blocking(ctx).over(s.core.rules.Load()), shape)
	if err != nil {
		return nil, s.core.status(err, true)
	}
	out := new(pb.RangeResponse)
	return out, s.core.status(decode(answer, out), true)
}

// Txn implements valuetxn.Store.
func (s store) Txn(ctx context.Context, t *pb.TxnRequest, limit int) (*pb.TxnResponse, error) {
	msg, err := encode(t)
	if err != nil {
		return nil, s.core.status(err, false)
	}
	msg, shape, err := etcdwire.TxnRequest(msg, blocking(ctx).over(s.at))
	if err != nil {
		return nil, s.core.status(err, false)
	}
	answer, err := s.ask(ctx, methodTxn, msg, limit)
	if err != nil {
		return nil, err
	}
	answer, err = etcdwire.TxnResponse(answer, blocking(ctx).over(s.core.rules.Load()), shape)
	if err != nil {
		return nil, s.core.status(err, true)
	}
	out := new(pb.TxnResponse)
	return out, s.core.status(decode(answer, out), true)
}

func (c *rangeCall) exchanges() bool { return c.byValue }

// exchange sorts a range by its decrypted values.
func (c *rangeCall) exchange(ctx context.Context, msg []byte, ask asker) ([]byte, error) {
	asked := new(pb.RangeRequest)
	if err := decode(msg, asked); err != nil {
		return nil, c.core.status(err, false)
	}
	answer, err := sortedRange(ctx, store{&c.kvCall, ask}, asked)
	if err != nil {
		return nil, err
	}
	out, err := encode(answer)
	return out, c.core.status(err, true)
}

// exchangeStream implements streamExchanger.
func (c *rangeCall) exchangeStream(ctx context.Context, msg []byte, ask asker, send func([]byte) error) error {
	asked := new(pb.RangeRequest)
	if err := decode(msg, asked); err != nil {
		return c.core.status(err, false)
	}
	header, err := c.pin(ctx, asked, ask)
	if err != nil {
		return err
	}
	return sortedStream(ctx, store{&c.kvCall, ask}, asked, header, c.core.maxRequest, func(r *pb.RangeStreamResponse) error {
		answer, err := encode(r)
		if err != nil {
			return c.core.status(err, true)
		}
		return send(answer)
	})
}

// pin asks for the number of keys as a stream, so that etcd says whether it has the method, and the
// client the permission. It returns the header, with the revision to read at.
func (c *rangeCall) pin(ctx context.Context, asked *pb.RangeRequest, ask asker) (*pb.ResponseHeader, error) {
	count, _ := proto.Clone(asked).(*pb.RangeRequest)
	count.CountOnly, count.SortTarget = true, pb.RangeRequest_KEY
	msg, err := encode(count)
	if err != nil {
		return nil, c.core.status(err, false)
	}
	if msg, err = ask(ctx, methodRangeStream, msg, maxByValue); err != nil {
		return nil, err
	}
	answer := new(pb.RangeStreamResponse)
	if err := decode(msg, answer); err != nil {
		return nil, c.core.status(err, true)
	}
	return answer.GetRangeResponse().GetHeader(), nil
}

// decideStream decides who serves a stream that may meet a rule.
func (c *rangeCall) decideStream(msg []byte) error {
	r := new(pb.RangeRequest)
	if err := decode(msg, r); err != nil {
		return err
	}
	sorts := r.GetSortTarget() != pb.RangeRequest_KEY
	filters := r.GetMinModRevision() != 0 || r.GetMaxModRevision() != 0 || r.GetMinCreateRevision() != 0 || r.GetMaxCreateRevision() != 0
	// What etcd refuses it could answer one day, by ciphertexts.
	c.refused = c.byValue && (r.GetSortOrder() != pb.RangeRequest_NONE || filters)
	_, known := pb.RangeRequest_SortTarget_name[int32(r.GetSortTarget())]
	c.byValue = sorts && known && r.GetSortOrder() == pb.RangeRequest_NONE && !filters && !r.GetCountOnly() && len(r.GetKey()) > 0
	c.touches = c.touches || c.refused
	return nil
}

func (c *txnCall) exchanges() bool { return c.byValue || c.over }

// exchange serves a transaction that compares or sorts by value, or deletes a range with own keys in it.
func (c *txnCall) exchange(ctx context.Context, msg []byte, ask asker) ([]byte, error) {
	client := new(pb.TxnRequest)
	if err := decode(msg, client); err != nil {
		return nil, c.core.status(err, false)
	}
	asked := client
	if c.over {
		asked, _ = proto.Clone(client).(*pb.TxnRequest)
		c.at.own.leaveOut(asked)
	}
	answer, err := newValueTxn(store{&c.kvCall, ask}, c.core.turns, asked).serve(ctx)
	if err != nil {
		return nil, err
	}
	if c.over {
		if err := c.at.own.putBack(client, answer); err != nil {
			return nil, c.core.status(err, true)
		}
	}
	out, err := encode(answer)
	return out, c.core.status(err, true)
}
