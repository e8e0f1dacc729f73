package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
)

// ruleSet is an immutable set of rules, sorted by prefix, that answers in O(log n). A reload swaps the whole set.
type ruleSet struct {
	rules []ruleEntry
}

type ruleEntry struct {
	prefix []byte
	sealer Sealer
	parent int // the longest other rule whose prefix begins this one, -1 for none
}

var _ etcdwire.Rules = (*ruleSet)(nil)

// newRuleSet sorts rules. It reports a rule without a Sealer and two rules with one prefix, all of them at once.
func newRuleSet(rules []Rule) (*ruleSet, error) {
	var problems []error
	sorted := slices.Clone(rules)
	slices.SortStableFunc(sorted, func(a, b Rule) int { return strings.Compare(a.Prefix, b.Prefix) })
	set := &ruleSet{rules: make([]ruleEntry, 0, len(sorted))}
	for i, r := range sorted {
		if r.Sealer == nil {
			problems = append(problems, fmt.Errorf("rule %q: no sealer", r.Prefix))
		}
		if i > 0 && sorted[i-1].Prefix == r.Prefix {
			problems = append(problems, fmt.Errorf("rule %q: a second rule with the same prefix", r.Prefix))
		}
		// The nearest rule before this one either begins it or leads to the one that does.
		parent := i - 1
		for parent >= 0 && !strings.HasPrefix(r.Prefix, sorted[parent].Prefix) {
			parent = set.rules[parent].parent
		}
		set.rules = append(set.rules, ruleEntry{prefix: []byte(r.Prefix), sealer: r.Sealer, parent: parent})
	}
	if len(problems) > 0 {
		return nil, errors.Join(problems...)
	}
	return set, nil
}

func (s *ruleSet) empty() bool { return len(s.rules) == 0 }

// lookup returns the rule with the longest prefix of key, or nil.
func (s *ruleSet) lookup(key []byte) *ruleEntry {
	// Every prefix of key sorts at or before key, and whatever sorts between one of them and key begins with it. So the last rule
	// at or before key is the match, or its chain of parents leads there.
	i, found := slices.BinarySearchFunc(s.rules, key, func(r ruleEntry, k []byte) int { return bytes.Compare(r.prefix, k) })
	if !found {
		i--
	}
	for i >= 0 {
		if bytes.HasPrefix(key, s.rules[i].prefix) {
			return &s.rules[i]
		}
		i = s.rules[i].parent
	}
	return nil
}

// Overlaps implements etcdwire.Rules. A range whose end is not after its start holds no key.
func (s *ruleSet) Overlaps(key, rangeEnd []byte) bool {
	if len(s.rules) == 0 {
		return false
	}
	if len(rangeEnd) == 0 {
		return s.lookup(key) != nil
	}
	open := len(rangeEnd) == 1 && rangeEnd[0] == 0
	if !open && bytes.Compare(key, rangeEnd) >= 0 {
		return false
	}
	if s.lookup(key) != nil {
		return true
	}
	// No rule covers key itself, so a rule overlaps only if it begins inside the range.
	i, _ := slices.BinarySearchFunc(s.rules, key, func(r ruleEntry, k []byte) int { return bytes.Compare(r.prefix, k) })
	return i < len(s.rules) && (open || bytes.Compare(s.rules[i].prefix, rangeEnd) < 0)
}

// Seal implements etcdwire.Rules.
func (s *ruleSet) Seal(ctx context.Context, key, value []byte) ([]byte, error) {
	if r := s.lookup(key); r != nil {
		return r.sealer.Seal(ctx, key, value)
	}
	return value, nil
}

// Open implements etcdwire.Rules.
func (s *ruleSet) Open(ctx context.Context, key, stored []byte) ([]byte, error) {
	if r := s.lookup(key); r != nil {
		return r.sealer.Open(ctx, key, stored)
	}
	return stored, nil
}

// guardRules are the rules as a client sees them that is given stored bytes: it may read everything as etcd holds it, and
// write nothing that a rule covers.
type guardRules struct{ *ruleSet }

// Seal implements etcdwire.Rules.
func (g guardRules) Seal(_ context.Context, key, value []byte) ([]byte, error) {
	if g.lookup(key) != nil {
		return nil, errCiphertextWrite
	}
	return value, nil
}

// Open implements etcdwire.Rules.
func (g guardRules) Open(_ context.Context, _, stored []byte) ([]byte, error) { return stored, nil }
