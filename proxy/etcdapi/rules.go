package etcdapi

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/prefix"
)

// RuleSet is an immutable set of rules. A reload swaps the whole set.
type RuleSet struct {
	*prefix.Set[Sealer]
	Own      ownKeys // of Config.OwnPrefixes
	ownRuled bool    // some own key begins with the prefix of a rule
}

// NewRuleSet checks rules, and prefixes of the proxies' own keys. It reports a rule without a
// Sealer, two rules with one prefix, and an own prefix that does not end in a slash, all of them at
// once.
func NewRuleSet(rules []Rule, own ...string) (*RuleSet, error) {
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
	// which would be every key
	own = slices.DeleteFunc(slices.Clone(own), func(p string) bool { return p == "" })
	for _, p := range own {
		// the keys of elections and locks are judged by the slash
		if len(p) < 2 || p[len(p)-1] != '/' {
			problems = append(problems, fmt.Errorf("own prefix %q: it does not end in a slash, or is nothing else", p))
		}
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	set := &RuleSet{Set: prefix.New(entries), Own: newOwnKeys(own)}
	for _, r := range rules {
		set.ownRuled = set.ownRuled || set.Own.has([]byte(r.Prefix)) ||
			slices.ContainsFunc(own, func(p string) bool { return strings.HasPrefix(p, r.Prefix) })
	}
	return set, nil
}

// sealer returns the sealer that holds for key, or nil.
func (s *RuleSet) sealer(key []byte) Sealer {
	sealer, ok := s.Lookup(key)
	if !ok || s.ownRuled && s.Own.has(key) {
		return nil
	}
	return sealer
}

func (s *RuleSet) empty() bool { return s.Len() == 0 && s.Own.empty() }

// covers reports whether a rule holds for key.
func (s *RuleSet) covers(key []byte) bool { return s.sealer(key) != nil }

// Covers implements etcdwire.Rules.
func (s *RuleSet) Covers(key []byte) bool {
	_, ok := s.Lookup(key)
	return ok || s.Own.has(key)
}

// Seal encrypts a value and appends it to dst. It returns nil for one that stays as it is. Calls
// refuse a write of an own key before they get here.
func (s *RuleSet) Seal(ctx context.Context, dst, key, value []byte) ([]byte, error) {
	if s.Own.has(key) {
		return nil, errOwnKey
	}
	if sealer, ok := s.Lookup(key); ok {
		return sealer.Seal(ctx, dst, key, value)
	}
	return nil, nil
}

// Open decrypts a value and appends it to dst.
func (s *RuleSet) Open(ctx context.Context, dst, key, stored []byte) ([]byte, error) {
	if sealer := s.sealer(key); sealer != nil {
		return sealer.Open(ctx, dst, key, stored)
	}
	return append(dst, stored...), nil
}

// storedRules are the rules as a read-only client sees them: it reads everything as etcd holds it,
// and writes nothing.
type storedRules struct{}

var _ etcdwire.Rules = storedRules{}

// Overlaps implements etcdwire.Rules: a client that has the stored bytes can have etcd compare and
// sort them.
func (storedRules) Overlaps(_, _ []byte) bool { return false }

// Covers implements etcdwire.Rules.
func (storedRules) Covers([]byte) bool { return true }

// Seal implements etcdwire.Rules.
func (storedRules) Seal(_, _, _ []byte) ([]byte, error) { return nil, errReadOnly }

// Open implements etcdwire.Rules.
func (storedRules) Open(dst, _, stored []byte) ([]byte, error) { return append(dst, stored...), nil }
