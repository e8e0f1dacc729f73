package etcdapi

import (
	"testing"

	pb "go.etcd.io/etcd/api/v3/etcdserverpb"

	"github.com/etcd-kms-proxy/etcd-kms-proxy/proxy/internal/proxytest"
)

// TestWrongFirst: of several things that are wrong with a put that keeps its value and has one, the
// client gets the error for what etcd would meet first.
func TestWrongFirst(t *testing.T) {
	const secret = "canary-value"
	// What is wrong first is said first.
	w := newCallWorld(t)
	w.core.Rules.Store(mustRules(t, []Rule{{Prefix: "", Sealer: proxytest.Reverser{}}}))
	for _, r := range []*pb.PutRequest{
		{Value: []byte(secret), IgnoreValue: true},
		{Key: []byte("k"), Value: []byte(secret), IgnoreValue: true, IgnoreLease: true, Lease: 1},
	} {
		_, want := w.Bare.Do(r)
		_, err := w.through(t.Context(), "Put", r)
		proxytest.SameStatus(t, err, want)
	}
}

func mustRules(t *testing.T, rules []Rule) *RuleSet {
	t.Helper()
	set, err := NewRuleSet(rules)
	if err != nil {
		t.Fatal(err)
	}
	return set
}
