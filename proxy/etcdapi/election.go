package etcdapi

import (
	"bytes"
	"fmt"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/listener"
)

// electionCall is a client's call of etcd's Election or Lock service, such as Campaign. If a rule
// covers its keys, the services in the proxy answer it (type hostedServices), and otherwise etcd.
type electionCall struct {
	unread
	core   *Core
	id     *listener.Identity
	keysOf func(msg []byte) (span, error)
	writes bool
	hosted bool
}

func newElectionCall(keysOf func([]byte) (span, error), a access) newCall {
	return func(c *Core, id *listener.Identity, _ *CallMemory) Call {
		return &electionCall{core: c, id: id, keysOf: keysOf, writes: a == writes}
	}
}

func (c *electionCall) Request(_ Mode, msg []byte) ([]byte, error) {
	rules := c.core.Rules.Load()
	if rules.empty() {
		return msg, nil
	}
	keys, err := c.keysOf(msg)
	if err != nil {
		return nil, c.core.status(err, false)
	}
	// What is written is the one key, or one that continues with the lease's ID: in hexadecimal
	// digits, so it is an own key only if what it begins with is.
	if c.writes && rules.Own.reach(keys.key, nil) == reachesOwn {
		return nil, errOwnKey
	}
	// a client that is given stored bytes gets those of etcd's own service
	c.hosted = rules.Overlaps(keys.key, keys.end) && !c.id.ReadOnly()
	return msg, nil
}

// namedKeys are the keys of an election or lock: all that begin with its name and a slash.
func namedKeys(msg []byte) (span, error) {
	name, err := etcdwire.Name(msg)
	if err != nil {
		return span{}, fmt.Errorf("name: %w", err)
	}
	start := append(bytes.Clone(name), '/')
	return span{start, after(start)}, nil
}

// leaderKey is the key of a leader.
func leaderKey(msg []byte) (span, error) {
	key, err := etcdwire.LeaderKey(msg)
	if err != nil {
		return span{}, fmt.Errorf("leader key: %w", err)
	}
	return span{key: key}, nil
}

// lockKey is the key that an Unlock removes.
func lockKey(msg []byte) (span, error) {
	key, err := etcdwire.Name(msg)
	if err != nil {
		return span{}, fmt.Errorf("key: %w", err)
	}
	return span{key: key}, nil
}
