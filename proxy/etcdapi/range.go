package etcdapi

import (
	"context"
	"errors"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/upstream"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/valuetxn"
)

// rangeCall is a Range or a RangeStream.
type rangeCall struct {
	kvCall
	shape  etcdwire.RangeShape
	stream bool
	// it sorts by encrypted values, or it is a stream under a rule and sorts by anything but keys
	byValue bool
	refused bool // etcd is to refuse it
}

func newRangeCall(c *Core, id *listener.Identity, memory *CallMemory) Call {
	memory.rangeCall = rangeCall{kvCall: kvCall{core: c, id: id, memory: memory}}
	return &memory.rangeCall
}

func newRangeStreamCall(c *Core, id *listener.Identity, _ *CallMemory) Call {
	return &rangeCall{kvCall: kvCall{core: c, id: id}, stream: true}
}

func (c *rangeCall) Request(_ Mode, msg []byte) ([]byte, error) {
	if !c.stream && upstream.IsProbe(msg) {
		return nil, upstream.ErrChained
	}
	if !c.begin() || c.id.Ciphertext {
		return msg, nil
	}
	var touches bool
	var err error
	c.shape, touches, err = etcdwire.RangeRequest(msg, tryRules{c.rules})
	c.byValue = errors.Is(err, etcdwire.ErrByValue)
	if err != nil && !c.byValue {
		return nil, c.core.status(err, false)
	}
	c.touches = !c.shape.KeysOnly && touches
	if c.stream && (c.byValue || c.touches) {
		if err := c.decideStream(msg); err != nil {
			return nil, c.core.status(err, false)
		}
	}
	return msg, nil
}

// Parts implements Call. A chunk of a stream is one field.
func (c *rangeCall) Parts() bool { return !c.stream }

func (c *rangeCall) Response(m Mode, dst, msg []byte) ([]byte, error) {
	if c.refused { // it has sorted ciphertexts
		return nil, errSortedStream
	}
	rewrite := etcdwire.RangeResponse
	if c.stream {
		rewrite = etcdwire.RangeStreamResponse
	}
	out, err := rewrite(dst, msg, m.Rules(c.core.Rules.Load()), c.shape)
	return out, c.core.status(err, true)
}

func (c *rangeCall) Exchanges() bool { return c.byValue }

// exchange sorts a range by its decrypted values.
func (c *rangeCall) exchange(ctx context.Context, msg []byte, send sendFunc) ([]byte, error) {
	request := new(pb.RangeRequest)
	if err := rpc.Unmarshal(msg, request); err != nil {
		return nil, c.core.status(err, false)
	}
	response, err := valuetxn.Range(ctx, store{&c.kvCall, send}, request)
	if err != nil {
		return nil, err
	}
	out, err := rpc.Marshal(response)
	return out, c.core.status(err, true)
}

// exchangeStream implements streamExchanger.
func (c *rangeCall) exchangeStream(ctx context.Context, msg []byte, send sendFunc, reply func([]byte) error) error {
	request := new(pb.RangeRequest)
	if err := rpc.Unmarshal(msg, request); err != nil {
		return c.core.status(err, false)
	}
	header, err := c.pin(ctx, request, send)
	if err != nil {
		return err
	}
	return valuetxn.RangeStream(ctx, store{&c.kvCall, send}, request, header, c.core.MaxRequest, func(r *pb.RangeStreamResponse) error {
		response, err := rpc.Marshal(r)
		if err != nil {
			return c.core.status(err, true)
		}
		return reply(response)
	})
}

// pin asks for the number of keys as a stream, so that etcd says whether it has the method, and the
// client the permission. It returns the header, with the revision to read at.
func (c *rangeCall) pin(ctx context.Context, request *pb.RangeRequest, send sendFunc) (*pb.ResponseHeader, error) {
	count, _ := proto.Clone(request).(*pb.RangeRequest)
	count.CountOnly, count.SortTarget = true, pb.RangeRequest_KEY
	response := new(pb.RangeStreamResponse)
	err := c.core.query(ctx, send, pb.KV_RangeStream_FullMethodName, count, response)
	return response.GetRangeResponse().GetHeader(), err
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
