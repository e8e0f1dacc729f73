package etcdapi

import (
	"context"
	"errors"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"google.golang.org/protobuf/proto"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/valuetxn"
)

// txnCall is a Txn. One that compares or sorts by values under a rule is handled by valuetxn.
type txnCall struct {
	whole
	kvCall
	shape   *etcdwire.TxnShape
	byValue bool // it compares or sorts by encrypted values
	changes bool // it has a put or a delete, in any branch: etcd sends it through raft
	own     bool // some put or delete names keys of the proxies' own
	over    bool // some delete reaches over keys of the proxies' own, which it leaves alone
}

// Range implements etcdwire.Operations.
func (c *txnCall) Range(key, end []byte) { c.touches = c.touches || c.rules.Overlaps(key, end) }

// Put implements etcdwire.Operations.
func (c *txnCall) Put(key []byte) {
	c.changes = true
	c.own = c.own || c.rules.Own.has(key)
	c.touches = c.touches || c.rules.covers(key)
}

// Delete implements etcdwire.Operations.
func (c *txnCall) Delete(key, end []byte) {
	c.changes = true
	reach := c.rules.Own.reach(key, end)
	c.own, c.over = c.own || reach == reachesOwn, c.over || reach == reachesOver
	c.touches = c.touches || c.rules.Overlaps(key, end)
}

func newTxnCall(c *Core, id *listener.Identity, memory *CallMemory) Call {
	memory.txnCall = txnCall{kvCall: kvCall{core: c, id: id, memory: memory}}
	return &memory.txnCall
}

func (c *txnCall) Request(m Mode, msg []byte) ([]byte, error) {
	ruled := c.begin()
	tooLarge := c.core.checkSize(msg)
	if !ruled && tooLarge == nil && !c.id.ReadOnly() {
		return msg, nil
	}
	c.touches, c.changes, c.own, c.over = false, false, false, false // it may be the second time
	malformed := etcdwire.EachOperation(msg, c)
	c.changes = c.changes || malformed != nil
	switch {
	case c.changes && c.id.ReadOnly():
		return nil, errReadOnly
	case c.changes && tooLarge != nil: // a transaction that only reads never meets etcd's limit
		return nil, tooLarge
	case c.own:
		return nil, errOwnKey
	}
	if c.id.ReadOnly() {
		_, _, err := etcdwire.TxnRequest(nil, msg, storedRules{})
		return msg, c.core.status(err, false)
	}
	if !ruled {
		return msg, nil
	}
	if malformed != nil {
		return nil, c.core.status(malformed, false)
	}
	var dst []byte
	if c.touches && c.changes {
		dst = c.memory.requestBuffer(len(msg))
	}
	out, shape, err := etcdwire.TxnRequest(dst, msg, m.Rules(c.rules))
	if err != nil || c.over { // it is not sent
		c.memory.freeRequest()
	}
	if errors.Is(err, etcdwire.ErrByValue) {
		c.byValue, c.touches = true, true
		return msg, nil
	}
	if c.shape = shape; c.over {
		out = msg
	}
	return out, c.core.status(err, false)
}

func (c *txnCall) Response(m Mode, dst, msg []byte) ([]byte, error) {
	out, err := etcdwire.TxnResponse(dst, msg, m.Rules(c.core.Rules.Load()), c.shape)
	return out, c.core.status(err, true)
}

func (c *txnCall) Exchanges() bool { return c.byValue || c.over }

// exchange serves a transaction that compares or sorts by value, or deletes a range with own keys
// in it.
func (c *txnCall) exchange(ctx context.Context, msg []byte, send sendFunc) ([]byte, error) {
	client := new(pb.TxnRequest)
	if err := rpc.Unmarshal(msg, client); err != nil {
		return nil, c.core.status(err, false)
	}
	request := client
	if c.over {
		request, _ = proto.Clone(client).(*pb.TxnRequest)
		c.rules.Own.leaveOut(request)
	}
	response, err := valuetxn.Txn(ctx, store{&c.kvCall, send}, c.core.Turns, request)
	if err != nil {
		return nil, err
	}
	if c.over {
		if err := c.rules.Own.putBack(client, response); err != nil {
			return nil, c.core.status(err, true)
		}
	}
	out, err := rpc.Marshal(response)
	return out, c.core.status(err, true)
}
