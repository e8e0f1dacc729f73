package etcdapi

import (
	"context"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/valuetxn"
)

// sendFunc sends one request to etcd, with the client's metadata, and returns the response, which
// is the caller's. A response longer than limit is ResourceExhausted.
type sendFunc func(ctx context.Context, method string, msg []byte, limit int) ([]byte, error)

// Exchanger is a call that may need several requests to etcd for one of the client: if Exchanges is
// true after Request, exchange sends them and returns the response for the client. It does not
// change msg, the client's request.
type Exchanger interface {
	Exchanges() bool
	exchange(ctx context.Context, msg []byte, send sendFunc) ([]byte, error)
}

// streamExchanger is an Exchanger with more than one response, which exchangeStream sends.
type streamExchanger interface {
	Exchanger
	exchangeStream(ctx context.Context, msg []byte, send sendFunc, reply func([]byte) error) error
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

// query sends a request that carries no value to etcd, and decodes the response. Its error is a
// status for the client.
func (c *Core) query(ctx context.Context, send sendFunc, method string, request, response proto.Message) error {
	msg, err := rpc.Marshal(request)
	if err != nil {
		return c.status(err, false)
	}
	if msg, err = send(ctx, method, msg, valuetxn.MaxResponseBytes); err != nil {
		return err
	}
	return c.status(rpc.Unmarshal(msg, response), true)
}

// store is etcd with plaintext values, as one call sees it. Its errors are statuses for the client.
type store struct {
	*kvCall
	send sendFunc
}

var _ valuetxn.Store = store{}

// Overlaps implements valuetxn.Store.
func (s store) Overlaps(key, rangeEnd []byte) bool { return s.rules.Overlaps(key, rangeEnd) }

// Range implements valuetxn.Store.
func (s store) Range(ctx context.Context, r *pb.RangeRequest) (*pb.RangeResponse, error) {
	msg, err := rpc.Marshal(r)
	if err != nil {
		return nil, s.core.status(err, false)
	}
	shape, _, err := etcdwire.RangeRequest(msg, tryRules{s.rules})
	if err != nil {
		return nil, s.core.status(err, false)
	}
	response, err := s.send(ctx, pb.KV_Range_FullMethodName, msg, valuetxn.MaxResponseBytes)
	if err != nil {
		return nil, err
	}
	response, err = etcdwire.RangeResponse(make([]byte, 0, len(response)), response, Blocking(ctx).Rules(s.core.Rules.Load()), shape)
	if err != nil {
		return nil, s.core.status(err, true)
	}
	out := new(pb.RangeResponse)
	return out, s.core.status(rpc.Unmarshal(response, out), true)
}

// Txn implements valuetxn.Store.
func (s store) Txn(ctx context.Context, t *pb.TxnRequest, limit int) (*pb.TxnResponse, error) {
	msg, err := rpc.Marshal(t)
	if err != nil {
		return nil, s.core.status(err, false)
	}
	msg, shape, err := etcdwire.TxnRequest(nil, msg, Blocking(ctx).Rules(s.rules))
	if err != nil {
		return nil, s.core.status(err, false)
	}
	response, err := s.send(ctx, pb.KV_Txn_FullMethodName, msg, limit)
	if err != nil {
		return nil, err
	}
	response, err = etcdwire.TxnResponse(make([]byte, 0, len(response)), response, Blocking(ctx).Rules(s.core.Rules.Load()), shape)
	if err != nil {
		return nil, s.core.status(err, true)
	}
	out := new(pb.TxnResponse)
	return out, s.core.status(rpc.Unmarshal(response, out), true)
}
