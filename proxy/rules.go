package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/prefix"
)

// ruleSet is an immutable set of rules. A reload swaps the whole set.
type ruleSet struct {
	*prefix.Set[Sealer]
	own [][]byte // Config.OwnPrefixes
}

var _ etcdwire.Rules = (*ruleSet)(nil)

// newRuleSet checks rules. It reports a rule without a Sealer and two rules with one prefix, all of them at once.
func newRuleSet(rules []Rule, own ...string) (*ruleSet, error) {
	var problems []error
	entries := make([]prefix.Entry[Sealer], 0, len(rules))
	seen := make(map[string]bool, len(rules))
	for _, r := range rules {
		if r.Sealer == nil {
			problems = append(problems, fmt.Errorf("rule %q: no sealer", r.Prefix))
		}
		if seen[r.Prefix] {
			problems = append(problems, fmt.Errorf("rule %q: a second rule with the same prefix", r.Prefix))
		}
		seen[r.Prefix] = true
		entries = append(entries, prefix.Entry[Sealer]{Prefix: r.Prefix, Value: r.Sealer})
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	set := &ruleSet{Set: prefix.New(entries)}
	for _, p := range own {
		if p != "" { // which would be every key
			set.own = append(set.own, []byte(p))
		}
	}
	return set, nil
}

func (s *ruleSet) empty() bool { return s.Len() == 0 && len(s.own) == 0 }

// isOwn reports whether key is one of the proxies' own, which no rule holds for.
func (s *ruleSet) isOwn(key []byte) bool {
	for _, p := range s.own {
		if bytes.HasPrefix(key, p) {
			return true
		}
	}
	return false
}

// covers reports whether a write of key concerns the proxy.
func (s *ruleSet) covers(key []byte) bool {
	_, ok := s.Lookup(key)
	return ok || s.isOwn(key)
}

// Seal implements etcdwire.Rules.
func (s *ruleSet) Seal(ctx context.Context, key, value []byte) ([]byte, error) {
	if s.isOwn(key) {
		return nil, errOwnKey
	}
	if sealer, ok := s.Lookup(key); ok {
		return sealer.Seal(ctx, key, value)
	}
	return value, nil
}

// Open implements etcdwire.Rules.
func (s *ruleSet) Open(ctx context.Context, key, stored []byte) ([]byte, error) {
	if s.isOwn(key) {
		return stored, nil
	}
	if sealer, ok := s.Lookup(key); ok {
		return sealer.Open(ctx, key, stored)
	}
	return stored, nil
}

// guardRules are the rules as a client sees them that is given stored bytes: it may read everything as etcd holds it, and
// write nothing that a rule covers.
type guardRules struct{ *ruleSet }

// Overlaps implements etcdwire.Rules: whoever has the stored bytes can have etcd compare and sort them.
func (guardRules) Overlaps(_, _ []byte) bool { return false }

// Seal implements etcdwire.Rules.
func (g guardRules) Seal(_ context.Context, key, value []byte) ([]byte, error) {
	if g.covers(key) {
		return nil, errCiphertextWrite
	}
	return value, nil
}

// Open implements etcdwire.Rules.
func (g guardRules) Open(_ context.Context, _, stored []byte) ([]byte, error) { return stored, nil }
