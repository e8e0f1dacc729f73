package etcdapi

import (
	"context"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/valuetxn"

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

// sendFunc sends one request to etcd, with the client's metadata, and returns the answer, which is the caller's. An answer longer than limit is ResourceExhausted.
type sendFunc func(ctx context.Context, method string, msg []byte, limit int) ([]byte, error)

// Exchanger is a call that has more to do than to rewrite one request and its answer: if exchanges is true after the request was seen, exchange does it all. msg is the
// client's message, which it does not change; the answer is for the client.
type Exchanger interface {
	Exchanges() bool
	exchange(ctx context.Context, msg []byte, ask sendFunc) ([]byte, error)
}

// streamExchanger is an exchanger with more than one answer, which it sends.
type streamExchanger interface {
	Exchanger
	exchangeStream(ctx context.Context, msg []byte, ask sendFunc, send func([]byte) error) error
}

// requested returns the request that goes to etcd for msg: what c makes of it, or msg itself if c
// exchanges, since exchange encrypts the requests that it makes.
func requested(ctx context.Context, c Call, msg []byte) ([]byte, error) {
	out, err := c.Request(Blocking(ctx), msg)
	if x, ok := c.(Exchanger); ok && x.Exchanges() {
		out = msg
	}
	return out, err
}

var (
	_ streamExchanger = (*rangeCall)(nil)
	_ Exchanger       = (*txnCall)(nil)
	_ Exchanger       = (*deleteCall)(nil)
	_ Exchanger       = (*revokeCall)(nil)
)

// store is etcd with plaintext values, as one call sees it. Its errors are statuses for the client.
type store struct {
	*kvCall
	ask sendFunc
}

var _ valuetxn.Store = store{}

// Overlaps implements valuetxn.Store.
func (s store) Overlaps(key, rangeEnd []byte) bool { return s.at.Overlaps(key, rangeEnd) }

// Range implements valuetxn.Store.
func (s store) Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	msg, err := rpc.Marshal(r)
	if err != nil {
		return nil, s.core.status(err, false)
	}
	shape, _, err := etcdwire.RangeRequest(msg, tryRules{s.at})
	if err != nil {
		return nil, s.core.status(err, false)
	}
	answer, err := s.ask(ctx, methodRange, msg, valuetxn.MaxResponseBytes)
	if err != nil {
		return nil, err
	}
	answer, err = etcdwire.RangeResponse(answer, Blocking(ctx).Rules(s.core.Rules.Load()), shape)
	if err != nil {
		return nil, s.core.status(err, true)
	}
	out := new(pb.RangeResponse)
	return out, s.core.status(rpc.Unmarshal(answer, out), true)
}

// Txn implements valuetxn.Store.
func (s store) Txn(ctx context.Context, t *pb.TxnRequest, limit int) (*pb.TxnResponse, error) {
	msg, err := rpc.Marshal(t)
	if err != nil {
		return nil, s.core.status(err, false)
	}
	msg, shape, err := etcdwire.TxnRequest(msg, Blocking(ctx).Rules(s.at))
	if err != nil {
		return nil, s.core.status(err, false)
	}
	answer, err := s.ask(ctx, methodTxn, msg, limit)
	if err != nil {
		return nil, err
	}
	answer, err = etcdwire.TxnResponse(answer, Blocking(ctx).Rules(s.core.Rules.Load()), shape)
	if err != nil {
		return nil, s.core.status(err, true)
	}
	out := new(pb.TxnResponse)
	return out, s.core.status(rpc.Unmarshal(answer, out), true)
}

func (c *rangeCall) Exchanges() bool { return c.byValue }

// exchange sorts a range by its decrypted values.
func (c *rangeCall) exchange(ctx context.Context, msg []byte, ask sendFunc) ([]byte, error) {
	asked := new(pb.RangeRequest)
	if err := rpc.Unmarshal(msg, asked); err != nil {
		return nil, c.core.status(err, false)
	}
	answer, err := valuetxn.Range(ctx, store{&c.kvCall, ask}, asked)
	if err != nil {
		return nil, err
	}
	out, err := rpc.Marshal(answer)
	return out, c.core.status(err, true)
}

// exchangeStream implements streamExchanger.
func (c *rangeCall) exchangeStream(ctx context.Context, msg []byte, ask sendFunc, send func([]byte) error) error {
	asked := new(pb.RangeRequest)
	if err := rpc.Unmarshal(msg, asked); err != nil {
		return c.core.status(err, false)
	}
	header, err := c.pin(ctx, asked, ask)
	if err != nil {
		return err
	}
	return valuetxn.RangeStream(ctx, store{&c.kvCall, ask}, asked, header, c.core.MaxRequest, func(r *pb.RangeStreamResponse) error {
		answer, err := rpc.Marshal(r)
		if err != nil {
			return c.core.status(err, true)
		}
		return send(answer)
	})
}

// pin asks for the number of keys as a stream, so that etcd says whether it has the method, and the
// client the permission. It returns the header, with the revision to read at.
func (c *rangeCall) pin(ctx context.Context, asked *pb.RangeRequest, ask sendFunc) (*pb.ResponseHeader, error) {
	count, _ := proto.Clone(asked).(*pb.RangeRequest)
	count.CountOnly, count.SortTarget = true, pb.RangeRequest_KEY
	msg, err := rpc.Marshal(count)
	if err != nil {
		return nil, c.core.status(err, false)
	}
	if msg, err = ask(ctx, methodRangeStream, msg, valuetxn.MaxResponseBytes); err != nil {
		return nil, err
	}
	answer := new(pb.RangeStreamResponse)
	if err := rpc.Unmarshal(msg, answer); err != nil {
		return nil, c.core.status(err, true)
	}
	return answer.GetRangeResponse().GetHeader(), nil
}

// decideStream decides who serves a stream that may meet a rule.
func (c *rangeCall) decideStream(msg []byte) error {
	r := new(pb.RangeRequest)
	if err := rpc.Unmarshal(msg, r); err != nil {
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

func (c *txnCall) Exchanges() bool { return c.byValue || c.over }

// exchange serves a transaction that compares or sorts by value, or deletes a range with own keys in it.
func (c *txnCall) exchange(ctx context.Context, msg []byte, ask sendFunc) ([]byte, error) {
	client := new(pb.TxnRequest)
	if err := rpc.Unmarshal(msg, client); err != nil {
		return nil, c.core.status(err, false)
	}
	asked := client
	if c.over {
		asked, _ = proto.Clone(client).(*pb.TxnRequest)
		c.at.Own.leaveOut(asked)
	}
	answer, err := valuetxn.NewTxn(store{&c.kvCall, ask}, c.core.Turns, asked).Serve(ctx)
	if err != nil {
		return nil, err
	}
	if c.over {
		if err := c.at.Own.putBack(client, answer); err != nil {
			return nil, c.core.status(err, true)
		}
	}
	out, err := rpc.Marshal(answer)
	return out, c.core.status(err, true)
}
