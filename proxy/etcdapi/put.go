package etcdapi

import (
	"cmp"
	"errors"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/rpc"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/valuetxn"
)

// putCall is a Put: etcdwire finds the value in the request, and the rule of its key encrypts it.
type putCall struct {
	whole
	kvCall
}

func newPutCall(c *Core, id *listener.Identity, memory *CallMemory) Call {
	memory.putCall = putCall{kvCall: kvCall{core: c, id: id, memory: memory}}
	return &memory.putCall
}

func (c *putCall) Request(m Mode, msg []byte) ([]byte, error) {
	if err := c.core.checkSize(msg); err != nil {
		return nil, err
	}
	if !c.begin() {
		return msg, nil
	}
	key, err := etcdwire.PutKey(msg)
	if err != nil {
		return nil, c.core.status(err, false)
	}
	if c.rules.Own.has(key) {
		return nil, errOwnKey
	}
	c.touches = c.rules.covers(key)
	var dst []byte
	if c.touches {
		dst = c.memory.requestBuffer(len(msg))
	}
	out, err := etcdwire.PutRequest(dst, msg, m.Rules(c.rules))
	if err != nil {
		c.memory.freeRequest()
	}
	if errors.Is(err, etcdwire.ErrValueProvided) {
		return nil, c.refusedPut(msg)
	}
	return out, c.core.status(err, false)
}

// Response decrypts the previous value. When that fails the client gets the error although the put
// was applied, as it does when the response of a write is lost on its way.
func (c *putCall) Response(m Mode, dst, msg []byte) ([]byte, error) {
	out, err := etcdwire.PutResponse(dst, msg, m.Rules(c.core.Rules.Load()))
	return out, c.core.status(err, true)
}

// refusedPut is the error for a put under a rule that has a value and is to keep the one there is.
// etcd refuses it, but would be sent the plaintext: so it is refused here, as etcd does.
func (c *putCall) refusedPut(msg []byte) error {
	put := new(pb.PutRequest)
	if err := rpc.Unmarshal(msg, put); err != nil {
		return c.core.status(err, false)
	}
	return cmp.Or(valuetxn.CheckPut(put), rpctypes.ErrGRPCValueProvided)
}
