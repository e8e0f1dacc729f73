// Package inventory reads what etcd stores under the configured rules and classifies each value: current, stale, plaintext,
// foreign or undecryptable. [Scan] reads keys page by page, [Survey] counts values per rule and key, and [BypassWatcher] watches
// for plaintext that was written to etcd directly. It reads etcd directly, not through the proxy, and writes nothing.
package inventory

import (
	"context"
	"slices"
	"strings"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/crypto/keyring"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/prefix"
)

// Sealer is what one rule does with values; [keyring.Sealer] is one.
type Sealer interface {
	// Seal returns what to store for value under key. The error is a [*keyring.Error].
	Seal(ctx context.Context, key, value []byte) ([]byte, error)
	// Inspect tells what stored is to the rule, without its reading policies, and leaves it as it is. The error is not nil exactly for
	// [keyring.Undecryptable], and is a [*keyring.Error].
	Inspect(ctx context.Context, key, stored []byte) (plaintext []byte, standing keyring.ValueState, err error)
	// Sealed tells by its first bytes whether stored was sealed by somebody whose values the rule opens.
	Sealed(stored []byte) bool
	// Recheck asks for a contact with the KMS behind stored, without waiting for it, and returns what is known of that KMS so far. ok is false if the
	// rule has none for it.
	Recheck(stored []byte) (state keyring.State, ok bool)
}

// Rule is a rule of the configuration.
type Rule struct {
	Prefix    string
	WriteWith string // a provider, or Plaintext
	Sealer    Sealer
	// Strict says that the rule refuses to read plaintext, and values of providers that it does not
	// read (allowPlaintextReads: false). Such a value was written to etcd directly, so nothing may
	// turn it into one that reads as genuine unless the operator says so.
	Strict bool
	// KeyNames are the names of the keys of kube-apiserver's own providers that Sealer has. They
	// tell where a name ends that holds colons.
	KeyNames []string
}

// Plaintext is the WriteWith of a rule that does not seal.
const Plaintext = "plaintext"

var _ Sealer = (*keyring.Sealer)(nil)

// Rules are the rules of a configuration, of which the longest prefix of a key wins. They are immutable and safe for concurrent use.
type Rules struct {
	set   *prefix.Set[int]
	list  []Rule
	since int64
}

// NewRules makes Rules. No two may have one prefix. The keys below an exempt prefix have no rule, even where one covers it.
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

// Since returns the same rules with the revision of etcd from before they held, for [BypassWatcher]; 0 if it is not known.
func (r *Rules) Since(revision int64) *Rules {
	held := *r
	held.since = revision
	return &held
}

// Of returns the rule for a key, or nil.
func (r *Rules) Of(key []byte) *Rule {
	i, ok := r.set.Lookup(key)
	if !ok || i < 0 {
		return nil
	}
	return &r.list[i]
}

// All returns the rules as they were given. The caller does not change them.
func (r *Rules) All() []Rule { return r.list }

// Prefixes returns prefixes that together cover all keys under rules, each once. Keys without a rule may be among them.
func (r *Rules) Prefixes() []string {
	return slices.DeleteFunc(r.set.Roots(), func(p string) bool {
		i, _ := r.set.Lookup([]byte(p))
		return i < 0
	})
}

// Within returns the prefixes that together cover all keys under rules that also begin with prefix.
func (r *Rules) Within(prefix string) []string { return within(r.Prefixes(), prefix) }

// within returns what the prefixes and one more have in common, as prefixes.
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

// SealingPrefixes returns prefixes that together cover all rules that seal.
func (r *Rules) SealingPrefixes() []string {
	return slices.DeleteFunc(r.Prefixes(), func(root string) bool {
		return !slices.ContainsFunc(r.list, func(rule Rule) bool { return rule.Seals() && strings.HasPrefix(rule.Prefix, root) })
	})
}
