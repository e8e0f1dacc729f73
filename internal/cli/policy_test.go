package cli

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/internal/auditlog"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/coordination"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle/inventory"
)

// TestPolicy: what is on record says again what it was made of, whatever the order, and rules are compared without the audit block, which a command may lack.
func TestPolicy(t *testing.T) {
	a := config.Rule{Prefix: "/a/", WriteWith: "x", ReadWith: []string{"z", "y"}, AllowPlaintextReads: true}
	b := config.Rule{Prefix: "/b/", WriteWith: config.Plaintext, ReadWith: []string{}, Recovery: []string{"r"}}
	plain, audited := policyOf([]config.Rule{b, a}, nil), policyOf([]config.Rule{a, b}, &config.Audit{Required: true})
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
	c, err := config.Load(newDir(t).config(t))
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
	back, _, err := parsePolicy(policyOf(rules, nil).Record)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range rules {
		if !slices.ContainsFunc(back, func(b config.Rule) bool { return b.Prefix == r.Prefix }) {
			t.Errorf("%q is not among %+v", r.Prefix, back)
		}
	}
	if a, b := policyOf(rules[:1], nil), policyOf(rules[1:2], nil); string(a.Rules) == string(b.Rules) {
		t.Errorf("two rules are one: %s", a.Rules)
	}
	m := newMetrics(&app{})
	for _, r := range rules {
		m.forRule(r.Prefix)
	}
	if _, err := m.sealed.GetMetricWithLabelValues(`\xffA`, "ok"); err != nil || utf8Name("größe") != "größe" {
		t.Errorf("labels: %v", err)
	}
}

// TestBypassOfBytes: keys that are not UTF-8 are told from each other in the log and the audit log.
func TestBypassOfBytes(t *testing.T) {
	var logged bytes.Buffer
	path := filepath.Join(t.TempDir(), "audit.log")
	records, err := auditlog.Open(auditlog.Config{Path: path})
	if err != nil {
		t.Fatal(err)
	}
	a := &app{log: slog.New(slog.NewJSONHandler(&logged, nil)), audit: &auditor{log: records}}
	a.metrics = newMetrics(a)
	b := newBypasses(a)
	rule := &inventory.Rule{Prefix: "\xff"}
	b.found(rule, "\xffA\xfe", 3)
	b.found(rule, "\xffA\xfd", 4)
	if err := records.Close(); err != nil {
		t.Fatal(err)
	}
	recorded, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{`"rule":"\\xff"`, `"key":"\\xffA\\xfe"`} {
		if !strings.Contains(logged.String(), want) {
			t.Errorf("%s is not in the log: %s", want, logged.String())
		}
	}
	for _, want := range []string{`"rule":"\\xff"`, `"key":"\\xffA\\xfe"`, `"key":"\\xffA\\xfd"`} {
		if !strings.Contains(string(recorded), want) {
			t.Errorf("%s is not in the audit log: %s", want, recorded)
		}
	}
}
