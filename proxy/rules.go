package proxy

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/etcdwire"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/prefix"
)

// ruleSet is an immutable set of rules. A reload swaps the whole set.
type ruleSet struct {
	*prefix.Set[Sealer]
	own ownKeys // of Config.OwnPrefixes
}

// newRuleSet checks rules, and prefixes of the proxies' own keys. It reports a rule without a
// Sealer, two rules with one prefix, and an own prefix that does not end in a slash, all of them at
// once.
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
	own = slices.DeleteFunc(slices.Clone(own), func(p string) bool { return p == "" }) // which would be every key
	for _, p := range own {
		if len(p) < 2 || p[len(p)-1] != '/' { // the keys of elections and locks are judged by the slash
			problems = append(problems, fmt.Errorf("own prefix %q: it does not end in a slash, or is nothing else", p))
		}
	}
	if err := errors.Join(problems...); err != nil {
		return nil, err
	}
	return &ruleSet{Set: prefix.New(entries), own: newOwnKeys(own)}, nil
}

func (s *ruleSet) empty() bool { return s.Len() == 0 && s.own.empty() }

// covers reports whether a rule holds for key.
func (s *ruleSet) covers(key []byte) bool {
	_, ok := s.Lookup(key)
	return ok && !s.own.has(key)
}

// Seal encrypts a value. Calls refuse a write of an own key before they get here.
func (s *ruleSet) Seal(ctx context.Context, key, value []byte) ([]byte, error) {
	if s.own.has(key) {
		return nil, errOwnKey
	}
	if sealer, ok := s.Lookup(key); ok {
		return sealer.Seal(ctx, key, value)
	}
	return value, nil
}

// Open decrypts a value.
func (s *ruleSet) Open(ctx context.Context, key, stored []byte) ([]byte, error) {
	if s.own.has(key) {
		return stored, nil
	}
	if sealer, ok := s.Lookup(key); ok {
		return sealer.Open(ctx, key, stored)
	}
	return stored, nil
}

// storedRules are the rules as a read-only client sees them: it reads everything as etcd holds it,
// and writes nothing.
type storedRules struct{}

var _ etcdwire.Rules = storedRules{}

// Overlaps implements etcdwire.Rules: a client that has the stored bytes can have etcd compare and
// sort them.
func (storedRules) Overlaps(_, _ []byte) bool { return false }

// Seal implements etcdwire.Rules.
func (storedRules) Seal(_, _ []byte) ([]byte, error) { return nil, errReadOnly }

// Open implements etcdwire.Rules.
func (storedRules) Open(_, stored []byte) ([]byte, error) { return stored, nil }
