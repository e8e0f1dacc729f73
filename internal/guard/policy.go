package guard

import (
	"bytes"
	"cmp"
	"encoding/json"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
)

// policy is what proxies compare. Its JSON is canonical: sorted, with every field.
type policy struct {
	Rules []policyRule `json:"rules"`
	Audit string       `json:"audit,omitempty"`
}

// The values of policy.Audit.
const (
	auditOn       = "on"
	auditRequired = "required"
)

type policyRule struct {
	Prefix string `json:"prefix"`
	// instead of Prefix, if that is not UTF-8
	PrefixBytes         []byte   `json:"prefixBytes,omitempty"`
	WriteWith           string   `json:"writeWith"`
	ReadWith            []string `json:"readWith"`
	Recovery            []string `json:"recovery"`
	AllowPlaintextReads bool     `json:"allowPlaintextReads"`
}

// PolicyOf returns the policy that proxies with this configuration must agree on. a may be nil.
func PolicyOf(rules []config.Rule, a *config.Audit) coordination.Policy {
	p, out := policy{Rules: []policyRule{}}, coordination.Policy{}
	sorted := func(names []string) []string { return slices.Sorted(slices.Values(append([]string{}, names...))) }
	for _, r := range rules {
		rule := policyRule{
			Prefix: r.Prefix, WriteWith: r.WriteWith, ReadWith: sorted(r.ReadWith), Recovery: sorted(r.Recovery), AllowPlaintextReads: r.AllowPlaintextReads,
		}
		if !utf8.ValidString(r.Prefix) {
			rule.Prefix, rule.PrefixBytes = "", []byte(r.Prefix)
		}
		p.Rules = append(p.Rules, rule)
		if r.WriteWith != config.Plaintext && !slices.Contains(out.Providers, r.WriteWith) {
			out.Providers = append(out.Providers, r.WriteWith)
		}
	}
	slices.SortFunc(p.Rules, func(a, b policyRule) int {
		return cmp.Or(strings.Compare(a.Prefix, b.Prefix), bytes.Compare(a.PrefixBytes, b.PrefixBytes))
	})
	slices.Sort(out.Providers)
	out.Rules, _ = json.Marshal(p) // strings and booleans do not fail
	switch {
	case a == nil:
	case a.Required:
		p.Audit = auditRequired
	default:
		p.Audit = auditOn
	}
	out.Record, _ = json.Marshal(p)
	return out
}

// parsePolicy is the inverse of PolicyOf for the fields that a policy has.
func parsePolicy(record []byte) (rules []config.Rule, a *config.Audit, err error) {
	var p policy
	if err := json.Unmarshal(record, &p); err != nil {
		return nil, nil, err
	}
	for _, r := range p.Rules {
		rules = append(rules, config.Rule{
			Prefix: cmp.Or(string(r.PrefixBytes), r.Prefix), WriteWith: r.WriteWith, ReadWith: r.ReadWith, Recovery: r.Recovery, AllowPlaintextReads: r.AllowPlaintextReads,
		})
	}
	if p.Audit != "" {
		a = &config.Audit{Required: p.Audit == auditRequired}
	}
	return rules, a, nil
}
