// Package inventory reads what etcd stores under the configured rules and classifies each value:
// current, stale, plaintext, foreign or undecryptable. [Scan] reads keys page by page, [Survey]
// counts values per rule and key, and [BypassWatcher] watches for plaintext that was written to
// etcd directly. It reads etcd directly, not through the proxy, and writes nothing.
package inventory

import (
	"context"
	"slices"
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/prefix"
)

// Sealer encrypts and decrypts the values of one rule. crypto/rule implements it.
type Sealer interface {
	// Seal returns the bytes to store for value under key. The error is a [*keyring.Error].
	Seal(ctx context.Context, key, value []byte) ([]byte, error)
	// Inspect decrypts stored and returns its state under the rule, ignoring the read policies. It
	// does not change stored. The error is a [*keyring.Error], and non-nil exactly for
	// [keyring.Undecryptable].
	Inspect(ctx context.Context, key, stored []byte) (plaintext []byte, state keyring.ValueState, err error)
	// Sealed reports, from the first bytes of stored, whether it was encrypted by a provider that
	// the rule reads.
	Sealed(stored []byte) bool
	// Recheck triggers a health check of the KMS that encrypted stored, without waiting for it, and
	// returns the state of that KMS. ok is false if the rule does not have it.
	Recheck(stored []byte) (state keyring.State, ok bool)
}

// Rule is a rule of the configuration.
type Rule struct {
	Prefix    string
	WriteWith string // a provider, or Plaintext
	Sealer    Sealer
	// Strict is the opposite of allowPlaintextReads: reads of plaintext, and of values of providers
	// that the rule does not read, are refused. Such a value was written to etcd directly, and must
	// not become a valid one unless the operator says so.
	Strict bool
	// KeyNames are the names of the keys of the API server's own providers that Sealer has. A name
	// may contain colons, and is recognized only if it is known.
	KeyNames []string
}

// Plaintext is the WriteWith of a rule that does not encrypt.
const Plaintext = "plaintext"

// Rules are the rules of a configuration. The rule with the longest matching prefix applies. Rules
// are immutable and safe for concurrent use.
type Rules struct {
	set   *prefix.Set[int]
	list  []Rule
	since int64
}

// NewRules returns Rules. Each prefix occurs once. Keys below an exempt prefix have no rule, even
// if a rule covers it.
func NewRules(rules []Rule, exempt ...string) *Rules {
	entries := make([]prefix.Entry[int], 0, len(rules)+len(exempt))
	for i, r := range rules {
		entries = append(entries, prefix.Entry[int]{Prefix: r.Prefix, Value: i})
	}
	for _, p := range exempt {
		entries = append(entries, prefix.Entry[int]{Prefix: p, Value: -1})
	}
	return &Rules{set: prefix.New(entries), list: rules}
}

// Since returns a copy of the rules with the etcd revision before which they were not in effect,
// for [BypassWatcher]. 0 is an unknown revision.
func (r *Rules) Since(revision int64) *Rules {
	held := *r
	held.since = revision
	return &held
}

// Of returns the rule that applies to a key, or nil.
func (r *Rules) Of(key []byte) *Rule {
	i, ok := r.set.Lookup(key)
	if !ok || i < 0 {
		return nil
	}
	return &r.list[i]
}

// All returns the rules in the order given. The caller must not change them.
func (r *Rules) All() []Rule { return r.list }

// Prefixes returns the shortest list of prefixes that covers all keys under rules. It may cover
// keys without a rule as well.
func (r *Rules) Prefixes() []string {
	return slices.DeleteFunc(r.set.Roots(), func(p string) bool {
		i, _ := r.set.Lookup([]byte(p))
		return i < 0
	})
}

// Within returns the prefixes that together cover all keys under rules that also begin with prefix.
func (r *Rules) Within(prefix string) []string { return within(r.Prefixes(), prefix) }

// within returns the prefixes of the keys that begin with one of prefixes and with also.
func within(prefixes []string, also string) []string {
	var both []string
	for _, p := range prefixes {
		switch {
		case strings.HasPrefix(p, also):
			both = append(both, p)
		case strings.HasPrefix(also, p):
			both = append(both, also)
		}
	}
	return both
}

// Under reports whether keys below prefix may have a rule.
func (r *Rules) Under(prefix string) bool { return len(within(r.Prefixes(), prefix)) > 0 }

// Seals reports whether the rule encrypts new values.
func (r *Rule) Seals() bool { return r.WriteWith != Plaintext }

// SealingPrefixes returns the shortest list of prefixes that covers all rules that encrypt.
func (r *Rules) SealingPrefixes() []string {
	return slices.DeleteFunc(r.Prefixes(), func(root string) bool {
		return !slices.ContainsFunc(r.list, func(rule Rule) bool { return rule.Seals() && strings.HasPrefix(rule.Prefix, root) })
	})
}
