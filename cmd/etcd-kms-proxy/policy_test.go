package main

import (
	"reflect"
	"testing"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/config"
	"github.com/etcd-kms-proxy/etcd-kms-proxy/lifecycle"
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
	if err != nil || c.Coordination.Prefix != lifecycle.DefaultPrefix {
		t.Errorf("%v, %v", c, err)
	}
}
