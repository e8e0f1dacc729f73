package guard

import (
	"reflect"
	"slices"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/clitest"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
)

// TestPolicy: what is on record says again what it was made of, whatever the order, and rules are
// compared without the audit block, which a command may lack.
func TestPolicy(t *testing.T) {
	a := config.Rule{Prefix: "/a/", WriteWith: "x", ReadWith: []string{"z", "y"}, AllowPlaintextReads: true}
	b := config.Rule{Prefix: "/b/", WriteWith: config.Plaintext, ReadWith: []string{}, Recovery: []string{"r"}}
	plain, audited := PolicyOf([]config.Rule{b, a}, nil), PolicyOf([]config.Rule{a, b}, &config.Audit{Required: true})
	if string(plain.Rules) != string(audited.Rules) || string(plain.Record) != string(plain.Rules) || string(audited.Record) == string(plain.Record) {
		t.Errorf("%s %s, %s %s", plain.Rules, plain.Record, audited.Rules, audited.Record)
	}
	if !reflect.DeepEqual(plain.Providers, []string{"x"}) {
		t.Errorf("providers %q", plain.Providers)
	}
	rules, audit, err := parsePolicy(audited.Record)
	if err != nil || audit == nil || !audit.Required || len(config.Weakens([]config.Rule{a, b}, rules)) > 0 || len(config.Weakens(rules, []config.Rule{a, b})) > 0 {
		t.Errorf("%+v, %+v, %v", rules, audit, err)
	}
}

// TestDefaultPrefix: config and lifecycle do not know each other, and mean the same place.
func TestDefaultPrefix(t *testing.T) {
	c, err := config.Load(clitest.NewDir(t).Config(t))
	if err != nil || c.Coordination.Prefix != coordination.DefaultPrefix {
		t.Errorf("%v, %v", c, err)
	}
}

// TestPolicyOfBytes: prefixes that are not UTF-8 stay what they are in the record, and are told
// from each other.
func TestPolicyOfBytes(t *testing.T) {
	rules := []config.Rule{
		{Prefix: "\xfe", WriteWith: "main", ReadWith: []string{}, Recovery: []string{}}, {Prefix: "\xffA", WriteWith: "main", ReadWith: []string{}, Recovery: []string{}},
		{Prefix: "\ufffd", WriteWith: "main", ReadWith: []string{}, Recovery: []string{}}, {Prefix: "", WriteWith: "main", ReadWith: []string{}, Recovery: []string{}},
	}
	back, _, err := parsePolicy(PolicyOf(rules, nil).Record)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rules {
		if !slices.ContainsFunc(back, func(b config.Rule) bool { return b.Prefix == r.Prefix }) {
			t.Errorf("%q is not among %+v", r.Prefix, back)
		}
	}
	if a, b := PolicyOf(rules[:1], nil), PolicyOf(rules[1:2], nil); string(a.Rules) == string(b.Rules) {
		t.Errorf("two rules are one: %s", a.Rules)
	}
}
