package etcdapi

import (
	"context"
	"fmt"
	"math"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
)

// deleteCall is a DeleteRange, whose response can have the previous values.
type deleteCall struct {
	whole
	kvCall
	over bool // its range reaches over keys of the proxies' own, which it leaves alone
}

func newDeleteCall(c *Core, id *listener.Identity, memory *CallMemory) Call {
	memory.deleteCall = deleteCall{kvCall: kvCall{core: c, id: id, memory: memory}}
	return &memory.deleteCall
}

func (c *deleteCall) Request(_ Mode, msg []byte) ([]byte, error) {
	if !c.begin() {
		return msg, nil
	}
	key, end, err := etcdwire.DeleteRangeRequest(msg)
	if err != nil {
		return nil, c.core.status(err, false)
	}
	reach := c.rules.Own.reach(key, end)
	if reach == reachesOwn {
		return nil, errOwnKey
	}
	c.over = reach == reachesOver
	c.touches = c.rules.Overlaps(key, end)
	return msg, nil
}

func (c *deleteCall) Response(m Mode, dst, msg []byte) ([]byte, error) {
	out, err := etcdwire.DeleteRangeResponse(dst, msg, m.Rules(c.core.Rules.Load()))
	return out, c.core.status(err, true)
}

func (c *deleteCall) Exchanges() bool { return c.over }

// exchange implements Exchanger.
func (c *deleteCall) exchange(ctx context.Context, msg []byte, send sendFunc) ([]byte, error) {
	request := new(pb.DeleteRangeRequest)
	if err := rpc.Unmarshal(msg, request); err != nil {
		return nil, c.core.status(err, false)
	}
	response, err := store{&c.kvCall, send}.Txn(ctx, &pb.TxnRequest{Success: c.rules.Own.parts(request)}, math.MaxInt32)
	if err != nil {
		return nil, err
	}
	all, err := joinedDeletes(response.GetResponses())
	if err != nil {
		return nil, c.core.status(err, true)
	}
	all.Header = response.GetHeader()
	out, err := rpc.Marshal(all)
	return out, c.core.status(err, true)
}

// joinedDeletes makes one response of those to parts. Its header is that of the last, which has the
// revision after all of them.
func joinedDeletes(responses []*pb.ResponseOp) (*pb.DeleteRangeResponse, error) {
	all := new(pb.DeleteRangeResponse)
	for _, part := range responses {
		one := part.GetResponseDeleteRange()
		if one == nil {
			return nil, fmt.Errorf("%w: it is about something else than deletes", etcdwire.ErrMalformed)
		}
		all.Header = one.GetHeader()
		all.Deleted += one.GetDeleted()
		all.PrevKvs = append(all.PrevKvs, one.GetPrevKvs()...)
	}
	return all, nil
}
