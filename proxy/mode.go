package proxy

import (
	"context"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

// mode says whether a call may wait for the KMS while it rewrites a message. Where it may not, a
// value that needs the KMS is the error [ErrWouldBlock].
type mode struct {
	ctx     context.Context   // of who waits; nil: it must not wait
	blocked *etcdwire.Blocked // how far a response was rewritten when it would have had to wait; or nil
}

// nonBlocking is the mode of a goroutine that others depend on.
var nonBlocking mode

// blocking is the mode of a goroutine that a call has to itself.
func blocking(ctx context.Context) mode { return mode{ctx: ctx} }

// over returns rules that encrypt and decrypt in this mode.
func (m mode) over(set *ruleSet) etcdwire.Rules {
	if m.ctx == nil {
		return tryingRules{set}
	}
	var rules etcdwire.Rules = &waitingRules{set, m.ctx}
	if m.blocked != nil {
		rules = m.blocked.Resume(rules)
	}
	return rules
}

// waitingRules encrypt and decrypt within the time of ctx.
type waitingRules struct {
	*ruleSet
	ctx context.Context
}

// Seal implements etcdwire.Rules.
func (r *waitingRules) Seal(key, value []byte) ([]byte, error) {
	return r.ruleSet.Seal(r.ctx, key, value)
}

// Open implements etcdwire.Rules.
func (r *waitingRules) Open(key, stored []byte) ([]byte, error) {
	return r.ruleSet.Open(r.ctx, key, stored)
}

// tryingRules never wait.
type tryingRules struct{ *ruleSet }

// Seal implements etcdwire.Rules.
func (r tryingRules) Seal(key, value []byte) ([]byte, error) {
	if r.own.has(key) {
		return nil, errOwnKey
	}
	if sealer, ok := r.Lookup(key); ok {
		return sealer.TrySeal(key, value)
	}
	return value, nil
}

// Open implements etcdwire.Rules.
func (r tryingRules) Open(key, stored []byte) ([]byte, error) {
	if r.own.has(key) {
		return stored, nil
	}
	if sealer, ok := r.Lookup(key); ok {
		return sealer.TryOpen(key, stored)
	}
	return stored, nil
}
