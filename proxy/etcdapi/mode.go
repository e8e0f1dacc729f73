package etcdapi

import (
	"context"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

// Mode says whether a call may wait for the KMS while it rewrites a message. Where it may not, a
// value that needs the KMS is the error [ErrWouldBlock].
type Mode struct {
	Ctx context.Context // of a caller that waits; nil: it must not wait
}

// NonBlocking is the mode of a goroutine that others depend on.
var NonBlocking Mode

// Blocking is the mode of a goroutine that a call has to itself.
func Blocking(ctx context.Context) Mode { return Mode{Ctx: ctx} }

// Rules returns rules that encrypt and decrypt in this mode.
func (m Mode) Rules(set *RuleSet) etcdwire.Rules {
	if m.Ctx == nil {
		return tryRules{set}
	}
	return &waitRules{set, m.Ctx}
}

// waitRules encrypt and decrypt within the time of ctx.
type waitRules struct {
	*RuleSet
	ctx context.Context
}

// Seal implements etcdwire.Rules.
func (r *waitRules) Seal(dst, key, value []byte) ([]byte, error) {
	return r.RuleSet.Seal(r.ctx, dst, key, value)
}

// Open implements etcdwire.Rules.
func (r *waitRules) Open(dst, key, stored []byte) ([]byte, error) {
	return r.RuleSet.Open(r.ctx, dst, key, stored)
}

// tryRules never wait.
type tryRules struct{ *RuleSet }

// Seal implements etcdwire.Rules.
func (r tryRules) Seal(dst, key, value []byte) ([]byte, error) {
	if r.Own.has(key) {
		return nil, errOwnKey
	}
	if sealer, ok := r.Lookup(key); ok {
		return sealer.TrySeal(dst, key, value)
	}
	return nil, nil
}

// Open implements etcdwire.Rules.
func (r tryRules) Open(dst, key, stored []byte) ([]byte, error) {
	if sealer := r.sealer(key); sealer != nil {
		return sealer.TryOpen(dst, key, stored)
	}
	return append(dst, stored...), nil
}
